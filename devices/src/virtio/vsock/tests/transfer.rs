//! Bulk data and flow control, 5.10.6.3.

use std::io::{Read, Write};
use std::sync::mpsc;
use std::thread;

use super::guest::{Guest, MOMENT, RX, blocking, pattern};
use crate::virtio::vsock::packet::{Header, op};

/// Far beyond every buffer on the way.
const BULK: usize = 3 << 20;

/// Sends `bytes` as the guest, within the credit that the host's packets grant.
fn send_all(guest: &mut Guest, of: &Header, bytes: &[u8], mut sent: u32) {
    let mut last = *of;
    for part in bytes.chunks(16 * 1024) {
        let len = u32::try_from(part.len()).unwrap();
        while last.buf_alloc - sent.wrapping_sub(last.fwd_cnt) < len {
            last = guest.expect(op::CREDIT_UPDATE);
        }
        guest.answer(of, op::RW, 0, part);
        sent = sent.wrapping_add(len);
    }
}

#[test]
fn guest_to_host_beyond_every_buffer() {
    let mut guest = Guest::new();
    let (_, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    // The first packet that tells the host's buffer.
    stream.write_all(b"go").unwrap();
    let of = guest.expect(op::RW);
    assert!(of.buf_alloc >= 64 * 1024);
    let reader = thread::spawn(move || {
        let mut got = vec![0; BULK];
        stream.read_exact(&mut got).unwrap();
        (got, stream)
    });
    let bytes = pattern(BULK);
    send_all(&mut guest, &of, &bytes, 0);
    let (got, _stream) = reader.join().unwrap();
    assert!(got == bytes);
}

#[test]
fn host_to_guest_never_exceeds_the_credit() {
    let mut guest = Guest::new();
    guest.buf_alloc = 10_000;
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    let bytes = pattern(BULK / 8);
    let expected = bytes.clone();
    let writer = thread::spawn(move || {
        stream.write_all(&bytes).unwrap();
        stream
    });
    let mut got = Vec::new();
    let mut requests = 0;
    while got.len() < expected.len() {
        let (header, payload) = guest.recv();
        match header.op {
            op::RW => {
                got.extend(payload);
                let in_flight = u32::try_from(got.len()).unwrap() - guest.fwd_cnt;
                assert!(in_flight <= guest.buf_alloc, "{in_flight} bytes in flight");
            }
            op::CREDIT_REQUEST => {
                requests += 1;
                assert_eq!(got.len() - guest.fwd_cnt as usize, 10_000);
                guest.fwd_cnt = u32::try_from(got.len()).unwrap();
                guest.answer(&of, op::CREDIT_UPDATE, 0, &[]);
            }
            other => panic!("op {other}"),
        }
    }
    assert!(got == expected);
    assert!(requests > 10);
    drop(writer.join().unwrap());
}

#[test]
fn without_credit_nothing_is_sent_and_asked_once() {
    let mut guest = Guest::new();
    guest.buf_alloc = 0;
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    stream.write_all(b"stuck").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    // A guest that answers "still nothing", or lies about what it has taken.
    guest.answer(&of, op::CREDIT_UPDATE, 0, &[]);
    guest.buf_alloc = 100;
    guest.fwd_cnt = 7;
    guest.answer(&of, op::CREDIT_UPDATE, 0, &[]);
    thread::sleep(MOMENT);
    assert!(guest.driver.queues[RX].pop_used().is_none());
    guest.fwd_cnt = 0;
    guest.answer(&of, op::CREDIT_UPDATE, 0, &[]);
    let (header, payload) = guest.recv();
    assert_eq!((header.op, payload.as_slice()), (op::RW, &b"stuck"[..]));
}

#[test]
fn the_guest_may_ask_for_credit() {
    let mut guest = Guest::new();
    let (of, _stream) = guest.accept(1);
    guest.answer(&of, op::RW, 0, b"12345");
    guest.answer(&of, op::CREDIT_REQUEST, 0, &[]);
    let update = guest.expect(op::CREDIT_UPDATE);
    assert_eq!(update.fwd_cnt, 5);
}

#[test]
fn a_guest_that_sends_without_credit_is_reset() {
    let mut guest = Guest::new();
    // Nobody reads the stream.
    let (of, _stream) = guest.accept(1);
    let mut sent = 0_usize;
    let reset = loop {
        guest.answer(&of, op::RW, 0, &[7; 32 * 1024]);
        sent += 32 * 1024;
        assert!(sent < 4 << 20, "the device buffers without bound");
        guest.answer(&of, op::CREDIT_REQUEST, 0, &[]);
        let (header, _) = guest.recv();
        if header.op == op::RST {
            break header;
        }
    };
    assert_eq!(reset.dst_port, of.dst_port);
}

#[test]
fn a_length_beyond_the_buffers_is_reset() {
    let mut guest = Guest::new();
    for len in [6, 65_537, u32::MAX] {
        let (of, _stream) = guest.accept(1);
        let mut header = guest.header(op::RW, of.src_port, of.dst_port);
        header.len = len;
        guest.send_header(&header, b"short");
        guest.expect(op::RST);
    }
}

#[test]
fn a_stalled_stream_stalls_no_other() {
    let mut guest = Guest::new();
    let (stalled, _unread) = guest.accept(1);
    for _ in 0..16 {
        guest.answer(&stalled, op::RW, 0, &[1; 16 * 1024]);
    }
    // Credit updates of the stalled one may come first.
    let result = guest.handle.connect(2);
    let request = loop {
        let (header, _) = guest.recv();
        if header.op == op::REQUEST {
            break header;
        }
    };
    guest.answer(&request, op::RESPONSE, 0, &[]);
    let mut stream = blocking(super::guest::resolve(result).unwrap());
    guest.answer(&request, op::RW, 0, b"hello");
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

#[test]
fn many_streams_at_once() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..100).map(|port| guest.accept(port)).collect();
    for (of, stream) in &mut streams {
        stream.write_all(&of.dst_port.to_le_bytes()).unwrap();
    }
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < streams.len() {
        let (header, payload) = guest.recv();
        assert_eq!(payload, header.dst_port.to_le_bytes());
        assert!(seen.insert(header.dst_port));
    }
}

#[test]
fn a_starved_receive_queue_resumes() {
    let mut guest = Guest::inactive(crate::virtio::vsock::VsockConfig::new(3));
    guest.driver.activate().unwrap();
    let result = guest.handle.connect(1);
    guest.add_rx(1);
    let used = guest.driver.wait_used(RX);
    assert_eq!(used.len, 44);
    let request = Header::from_bytes(used.data[..44].try_into().unwrap());
    guest.answer(&request, op::RESPONSE, 0, &[]);
    let mut stream = blocking(super::guest::resolve(result).unwrap());
    let (done, finished) = mpsc::channel();
    let writer = thread::spawn(move || {
        stream.write_all(&pattern(20_000)).unwrap();
        done.send(()).unwrap();
        stream
    });
    finished.recv().unwrap();
    let mut got = Vec::new();
    while got.len() < 20_000 {
        // Buffers come one at a time.
        guest.add_rx(1);
        let used = guest.driver.wait_used(RX);
        got.extend_from_slice(&used.data[44..]);
    }
    assert!(got == pattern(20_000));
    drop(writer.join().unwrap());
}
