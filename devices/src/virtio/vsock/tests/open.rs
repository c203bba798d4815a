//! Connecting, listening, refusing, cancelling.

use std::io::{ErrorKind, Read, Write};

use super::guest::{EVENT, GUEST_CID, Guest, RX, TX, blocking, next, resolve};
use crate::testing::{Buffer, process};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::packet::op;
use crate::virtio::vsock::{Vsock, VsockConfig};

#[test]
fn config_space_is_the_cid_of_5_10_4() {
    let (device, _handle) = Vsock::new(VsockConfig::new(0x1234)).unwrap();
    let mut config = [0xff; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(1, &mut config[..2]);
    assert_eq!(config[..2], [0x12, 0]);
    device.read_config(u64::MAX, &mut config[..2]);
    assert_eq!(config[..2], [0, 0]);
    for reserved in [0, 1, 2, u32::MAX] {
        let err = Vsock::new(VsockConfig::new(reserved)).unwrap_err();
        assert!(err.to_string().contains("guest_cid"), "{err}");
    }
}

#[test]
fn host_connects_and_bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let (request, stream) = guest.accept(1024);
    assert_eq!(request.dst_cid, u64::from(GUEST_CID));
    let mut stream = blocking(stream);
    stream.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.recv();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, &b"to the guest"[..])
    );
    guest.answer(&request, op::RW, 0, b"to the host");
    let mut got = [0; 11];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to the host");
}

#[test]
fn streams_are_nonblocking() {
    let mut guest = Guest::new();
    let (_, mut stream) = guest.accept(1);
    let err = stream.read(&mut [0]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::WouldBlock);
    let mut listener = guest.handle.listen(2).unwrap();
    let (_, mut stream) = guest.connect(2, 77, &mut listener);
    let err = stream.read(&mut [0]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::WouldBlock);
}

#[test]
fn connects_wait_for_the_driver() {
    let mut guest = Guest::inactive(VsockConfig::new(GUEST_CID));
    let first = guest.handle.connect(10);
    let cancelled = guest.handle.connect(11);
    let second = guest.handle.connect(12);
    drop(cancelled);
    guest.activate();
    for (result, port) in [(first, 10), (second, 12)] {
        let request = guest.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        guest.answer(&request, op::RESPONSE, 0, &[]);
        resolve(result).unwrap();
    }
}

#[test]
fn a_refused_connect_says_so() {
    let mut guest = Guest::new();
    let result = guest.handle.connect(1024);
    let request = guest.expect(op::REQUEST);
    guest.answer(&request, op::RST, 0, &[]);
    assert_eq!(
        resolve(result).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
}

#[test]
fn dropping_the_receiver_resets_the_guest() {
    let mut guest = Guest::new();
    let result = guest.handle.connect(1024);
    let request = guest.expect(op::REQUEST);
    drop(result);
    let reset = guest.expect(op::RST);
    assert_eq!(
        (reset.src_port, reset.dst_port),
        (request.src_port, request.dst_port)
    );
    // The late answer is for nobody.
    guest.answer(&request, op::RESPONSE, 0, &[]);
    guest.expect(op::RST);
}

#[test]
fn an_answer_that_makes_no_sense_ends_the_connect() {
    let mut guest = Guest::new();
    let result = guest.handle.connect(1024);
    let request = guest.expect(op::REQUEST);
    guest.answer(&request, op::RW, 0, b"too early");
    assert_eq!(resolve(result).unwrap_err().kind(), ErrorKind::InvalidData);
    guest.expect(op::RST);
}

#[test]
fn a_port_has_one_listener_until_it_is_dropped() {
    let mut guest = Guest::new();
    let mut listener = guest.handle.listen(1000).unwrap();
    assert_eq!(
        guest.handle.listen(1000).unwrap_err().kind(),
        ErrorKind::AddrInUse
    );
    let (_, stream) = guest.connect(1000, 50, &mut listener);
    drop(listener);
    let request = guest.header(op::REQUEST, 1000, 51);
    guest.send_header(&request, &[]);
    guest.expect(op::RST);
    let mut listener = guest.handle.listen(1000).unwrap();
    let _held = guest.connect(1000, 52, &mut listener);
    // The first stream outlives its listener.
    blocking(stream).write_all(b"x").unwrap();
    guest.expect(op::RW);
}

#[test]
fn a_full_listener_refuses() {
    let mut guest = Guest::new();
    let mut listener = guest.handle.listen(1).unwrap();
    let mut accepted = 0;
    for port in 100.. {
        let request = guest.header(op::REQUEST, 1, port);
        guest.send_header(&request, &[]);
        match guest.recv().0.op {
            op::RESPONSE => accepted += 1,
            op::RST => break,
            other => panic!("op {other}"),
        }
    }
    for _ in 0..accepted {
        next(&mut listener).unwrap();
    }
    // Streams that nobody holds are closed by their readers: shut down, not reused.
    for _ in 0..accepted {
        guest.expect(op::SHUTDOWN);
    }
}

#[test]
fn packets_for_nobody_are_reset_and_resets_are_not() {
    let mut guest = Guest::new();
    for code in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, 0, 99] {
        let packet = guest.header(code, 5, 6);
        guest.send_header(&packet, &[]);
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (5, 6), "op {code}");
    }
    let reset = guest.header(op::RST, 5, 6);
    guest.send_header(&reset, &[]);
    let mut foreign = guest.header(op::REQUEST, 5, 6);
    foreign.src_cid = 99;
    guest.send_header(&foreign, &[]);
    foreign.src_cid = u64::from(GUEST_CID) | 1 << 32;
    guest.send_header(&foreign, &[]);
    let mut elsewhere = guest.header(op::REQUEST, 5, 6);
    elsewhere.dst_cid = 1;
    guest.send_header(&elsewhere, &[]);
    // 5.10.6.4: an unknown socket type is refused.
    let mut seqpacket = guest.header(op::REQUEST, 7, 8);
    seqpacket.kind = 2;
    guest.send_header(&seqpacket, &[]);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.kind), (7, 2));
}

#[test]
fn too_many_connections_are_refused_both_ways() {
    let mut config = VsockConfig::new(GUEST_CID);
    config.max_connections = 3;
    let mut guest = Guest::inactive(config);
    guest.activate();
    let mut listener = guest.handle.listen(1).unwrap();
    let _held: Vec<_> = (0..3)
        .map(|port| guest.connect(1, port, &mut listener))
        .collect();
    let request = guest.header(op::REQUEST, 1, 9);
    guest.send_header(&request, &[]);
    guest.expect(op::RST);
    let err = resolve(guest.handle.connect(1)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::QuotaExceeded);
    assert!(err.to_string().contains('3'), "{err}");
    // One goes, another may come.
    let reset = guest.header(op::RST, 1, 0);
    guest.send_header(&reset, &[]);
    guest.connect(1, 9, &mut listener);
}

#[test]
fn a_gone_device_fails_connects_and_ends_listeners() {
    let guest = Guest::new();
    let handle = guest.handle.clone();
    let mut listener = handle.listen(1).unwrap();
    let pending = handle.connect(5);
    drop(guest);
    let kind = resolve(pending).unwrap_err().kind();
    assert!(
        matches!(kind, ErrorKind::ConnectionReset | ErrorKind::NotConnected),
        "{kind}"
    );
    assert!(next(&mut listener).is_none());
    assert_eq!(
        resolve(handle.connect(5)).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    assert_eq!(
        handle.listen(1).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    handle.reset_transport();
}

#[test]
fn reset_drops_streams_and_the_device_works_again() {
    let mut guest = Guest::new();
    let (_, stream) = guest.accept(1024);
    let pending = guest.handle.connect(2000);
    guest.expect(op::REQUEST);
    guest.driver.device.reset();
    assert_eq!(
        resolve(pending).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    assert_eq!(blocking(stream).read(&mut [0]).unwrap(), 0);
    guest.driver.device.reset();

    let mut again = Guest {
        driver: crate::testing::DeviceDriver::new(
            Vsock::new(VsockConfig::new(GUEST_CID)).unwrap().0,
        ),
        handle: guest.handle.clone(),
        buf_alloc: guest.buf_alloc,
        fwd_cnt: 0,
    };
    // The same device, new rings.
    std::mem::swap(&mut again.driver.device, &mut guest.driver.device);
    again.activate();
    let (_, stream) = again.accept(1024);
    drop(stream);
}

#[test]
fn transport_reset_is_announced_before_new_connections() {
    let mut guest = Guest::new();
    let (request, stream) = guest.accept(1024);
    let mut listener = guest.handle.listen(7).unwrap();
    guest.handle.reset_transport();
    assert_eq!(blocking(stream).read(&mut [0]).unwrap(), 0);
    // No event buffer yet: the connect has to wait for it.
    let result = guest.handle.connect(2000);
    std::thread::sleep(super::guest::MOMENT);
    assert!(guest.driver.queues[RX].pop_used().is_none());
    let event = guest.driver.request(EVENT, &[Buffer::Writable(4)]);
    assert_eq!((event.len, event.data), (4, vec![0; 4]));
    let second = guest.expect(op::REQUEST);
    assert_eq!(second.dst_port, 2000);
    guest.answer(&second, op::RESPONSE, 0, &[]);
    resolve(result).unwrap();
    // The old connection is forgotten, listeners are not.
    guest.answer(&request, op::CREDIT_UPDATE, 0, &[]);
    let (first, _) = guest.recv();
    let reset = if first.op == op::SHUTDOWN {
        // The new stream was dropped by `resolve`.
        guest.recv().0
    } else {
        first
    };
    assert_eq!((reset.op, reset.dst_port), (op::RST, 1024));
    let request = guest.header(op::REQUEST, 7, 50);
    guest.send_header(&request, &[]);
    loop {
        match guest.recv().0.op {
            op::RESPONSE => break,
            op::SHUTDOWN => {}
            other => panic!("op {other}"),
        }
    }
    next(&mut listener).unwrap();
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_closes_the_streams() {
    let mut guest = Guest::new();
    let (_, stream) = guest.accept(1);
    guest.driver.queues[TX].set_avail_idx(9999);
    guest.driver.queues[TX].kick();
    assert!(
        guest
            .driver
            .wait_needs_reset()
            .starts_with("vsock: invalid queue")
    );
    assert_eq!(blocking(stream).read(&mut [0]).unwrap(), 0);
    assert!(guest.driver.runner.failures().is_empty());
}

#[test]
fn every_fd_is_released() {
    const NAME: &str = "virtio::vsock::tests::open::every_fd_is_released";
    if process::elsewhere(NAME) {
        return;
    }
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    {
        let dir = tempfile::tempdir().unwrap();
        let mut config = VsockConfig::new(GUEST_CID);
        config.uds_path = Some(dir.path().join("v"));
        let mut guest = Guest::inactive(config);
        let inactive = count();
        guest.activate();
        let mut listener = guest.handle.listen(1).unwrap();
        let mut held = Vec::new();
        for port in 0..20 {
            let (of, stream) = guest.accept(port);
            guest.answer(&of, op::RW, 0, b"unread");
            held.push(guest.connect(1, 100 + port, &mut listener).1);
            // Half of them stay open on the host's side.
            if port % 2 == 0 {
                drop(stream);
                guest.expect(op::SHUTDOWN);
            } else {
                held.push(stream);
            }
        }
        let _pending = guest.handle.connect(5);
        let _client = std::os::unix::net::UnixStream::connect(dir.path().join("v")).unwrap();
        guest.driver.device.reset();
        let ours = held.len() + 1;
        assert_eq!(
            count(),
            inactive + ours,
            "only the host's own ends are left"
        );
    }
    assert_eq!(count(), before);
}
