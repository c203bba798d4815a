//! Holding connects, quiescing, saving and restoring.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::guest::{
    EVENT, GUEST_BUFFER, GUEST_CID, Guest, MOMENT, RX, blocking, next, pattern, resolve,
};
use crate::testing::Buffer;
use crate::virtio::vsock::packet::{Header, op};
use crate::virtio::vsock::{Vsock, VsockConfig};
use crate::virtio::{StateError, VirtioDevice, state_tests};

const PORT: u32 = 1024;

impl Guest {
    /// Sends a connect that is not answered.
    fn dial(&mut self, host_port: u32, guest_port: u32) {
        let request = self.header(op::REQUEST, host_port, guest_port);
        self.send_header(&request, &[]);
    }

    /// The state, and the same guest on a fresh device that has it; not yet activated.
    fn restore(&mut self) -> Vec<u8> {
        self.driver.device.quiesce();
        let state = self.driver.device.save().unwrap();
        let (mut device, handle) = Vsock::new(VsockConfig::new(GUEST_CID)).unwrap();
        device.restore(&state).unwrap();
        self.driver.device = device;
        self.handle = handle;
        state
    }

    fn go_on(&mut self) {
        self.driver.activate().unwrap();
    }

    fn is_quiet(&self) -> bool {
        std::thread::sleep(MOMENT);
        self.driver.queues[RX].used_pending() == 0
    }

    /// An answer to the connect from `guest_port`.
    fn expect_for(&mut self, op: u16, guest_port: u32) -> Header {
        let header = self.expect(op);
        assert_eq!((header.src_port, header.dst_port), (PORT, guest_port));
        header
    }

    fn exchange(&mut self, header: &Header, stream: &mut UnixStream) {
        stream.write_all(b"ping").unwrap();
        let (packet, payload) = self.recv();
        assert_eq!((packet.op, payload.as_slice()), (op::RW, &b"ping"[..]));
        self.answer(header, op::RW, 0, b"pong");
        let mut got = [0; 4];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"pong");
    }
}

#[test]
fn dials_are_held_until_somebody_listens() {
    let mut guest = Guest::new();
    let mut held = guest.handle.hold(PORT).unwrap();
    let err = guest.handle.hold(PORT).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::AddrInUse);
    guest.dial(PORT + 1, 9);
    assert_eq!(guest.expect(op::RST).src_port, PORT + 1);
    held.try_recv().unwrap_err();
    for guest_port in 50..66 {
        guest.dial(PORT, guest_port);
    }
    held.try_recv().unwrap();
    assert!(guest.is_quiet());
    guest.dial(PORT, 66);
    guest.expect_for(op::RST, 66);
    // Two give up, one asks again.
    let reset = guest.header(op::RST, PORT, 51);
    guest.send_header(&reset, &[]);
    let shutdown = guest.header(op::SHUTDOWN, PORT, 52);
    guest.send_header(&shutdown, &[]);
    // A reset is not answered.
    guest.expect_for(op::RST, 52);
    guest.dial(PORT, 55);
    assert!(guest.is_quiet());

    let mut listener = guest.handle.listen(PORT).unwrap();
    let responses: Vec<_> = (50..66)
        .filter(|port| ![51, 52].contains(port))
        .map(|guest_port| guest.expect_for(op::RESPONSE, guest_port))
        .collect();
    let mut streams = Vec::new();
    for response in responses {
        let mut stream = blocking(next(&mut listener).unwrap());
        guest.exchange(&response, &mut stream);
        streams.push(stream);
    }
    let err = guest.handle.hold(PORT).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::AddrInUse);
    // As any port from now on.
    let (response, stream) = guest.connect(PORT, 70, &mut listener);
    guest.exchange(&response, &mut blocking(stream));
    drop(listener);
    let mut held = guest.handle.hold(PORT).unwrap();
    let handle = guest.handle.clone();
    drop(guest);
    held.try_recv().unwrap_err();
    assert_eq!(handle.hold(1).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn a_held_dial_is_answered_by_each_clone() {
    let mut guest = Guest::new();
    let mut held = guest.handle.hold(PORT).unwrap();
    guest.buf_alloc = 10;
    guest.dial(PORT, 50);
    guest.buf_alloc = GUEST_BUFFER;
    guest.dial(PORT, 51);
    held.try_recv().unwrap();
    for round in 0..3 {
        let state = guest.restore();
        // Whoever makes a template of a clone.
        let mut again = guest.handle.hold(PORT).unwrap();
        if round == 1 {
            guest.go_on();
            assert!(guest.is_quiet(), "held as before");
            again.try_recv().unwrap();
            guest.dial(PORT, 60 + round);
            assert!(guest.is_quiet(), "as are others");
            guest.driver.device.quiesce();
            assert_ne!(guest.driver.device.save().unwrap(), state);
        } else {
            assert_eq!(guest.driver.device.save().unwrap(), state);
        }
    }
    // Listening may come before the clone runs.
    let mut listener = guest.handle.listen(PORT).unwrap();
    guest.go_on();
    let first = guest.expect_for(op::RESPONSE, 50);
    let mut stream = blocking(next(&mut listener).unwrap());
    stream.write_all(&[7; 100]).unwrap();
    let second = guest.expect_for(op::RESPONSE, 51);
    guest.expect_for(op::RESPONSE, 61);
    // No more than the first one's credit.
    let (packet, payload) = guest.recv();
    assert_eq!((packet.dst_port, payload.len()), (50, 10));
    let mut other = blocking(next(&mut listener).unwrap());
    guest.expect_for(op::CREDIT_REQUEST, 50);
    guest.exchange(&second, &mut other);
    assert_eq!(
        guest.driver.queues[EVENT].used_pending(),
        0,
        "nothing was lost"
    );
    guest.answer(&first, op::RST, 0, &[]);
}

#[test]
fn lost_connections_are_reset_first() {
    let mut guest = Guest::inactive(VsockConfig::new(GUEST_CID));
    guest.go_on();
    guest.add_rx(1);
    let (request, mut stream) = guest.accept(77);
    let _held = guest.handle.hold(PORT).unwrap();
    guest.dial(PORT, 50);
    // Takes the only receive buffer.
    stream.write_all(b"!").unwrap();
    guest.driver.wait_used(RX);
    // Accepted, but the answer has not reached the guest.
    let mut listener = guest.handle.listen(5).unwrap();
    guest.dial(5, 90);
    let _accepted = next(&mut listener).unwrap();
    guest.restore();
    assert_eq!(blocking(stream).read(&mut [0]).unwrap(), 0);
    // Not even known from one more snapshot.
    guest.go_on();
    guest.driver.device.quiesce();
    let mut listener = guest.handle.listen(PORT).unwrap();
    let connect = guest.handle.connect(78);
    guest.go_on();
    guest.add_rx(32);
    let mut resets = [guest.expect(op::RST), guest.expect(op::RST)]
        .map(|reset| (reset.src_port, reset.dst_port));
    resets.sort_unstable();
    assert_eq!(resets, [(5, 90), (request.src_port, 77)]);
    let mut seen = [guest.recv().0, guest.recv().0];
    seen.sort_by_key(|header| header.op);
    let [dialled, answered] = seen;
    assert_eq!((dialled.op, dialled.dst_port), (op::REQUEST, 78));
    assert_ne!(dialled.src_port, request.src_port, "local ports go on");
    assert_eq!((answered.op, answered.dst_port), (op::RESPONSE, 50));
    next(&mut listener).unwrap();
    guest.answer(&dialled, op::RESPONSE, 0, &[]);
    resolve(connect).unwrap();
    assert_eq!(guest.driver.queues[EVENT].used_pending(), 0);
}

#[test]
fn quiescing_keeps_streams_and_what_is_on_its_way() {
    let mut guest = Guest::new();
    let mut listener = guest.handle.listen(7).unwrap();
    let (_, stream) = guest.accept(77);
    let mut stream = blocking(stream);
    let (response, accepted) = guest.connect(7, 50, &mut listener);
    let mut accepted = blocking(accepted);
    let data = pattern(4000);
    for round in 0..3 {
        guest.driver.device.quiesce();
        guest.driver.device.quiesce();
        guest.driver.device.save().unwrap();
        // From both sides while it stands still.
        stream.write_all(&data).unwrap();
        let mut header = guest.header(op::RW, response.src_port, response.dst_port);
        header.len = 4000;
        let mut packet = header.to_bytes().to_vec();
        packet.extend(&data);
        guest.driver.queues[super::guest::TX].add(&[Buffer::Readable(packet)]);
        let connect = guest.handle.connect(100 + round);
        assert!(guest.is_quiet());
        guest.go_on();
        guest.driver.wait_used(super::guest::TX);
        let mut got = vec![0; 4000];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(got, data);
        let mut payloads = Vec::new();
        let mut dialled = None;
        while payloads.len() < 4000 || dialled.is_none() {
            let (header, payload) = guest.recv();
            match header.op {
                op::REQUEST => dialled = Some(header),
                op::RW => payloads.extend(payload),
                other => panic!("op {other}"),
            }
        }
        assert_eq!(payloads, data);
        guest.answer(&dialled.unwrap(), op::RESPONSE, 0, &[]);
        std::mem::forget(resolve(connect).unwrap());
    }
    // A connect of the host that the guest answers after the pause.
    let connect = guest.handle.connect(200);
    let request = guest.expect(op::REQUEST);
    guest.driver.device.quiesce();
    guest.go_on();
    guest.answer(&request, op::RESPONSE, 0, &[]);
    guest.exchange(&request, &mut blocking(resolve(connect).unwrap()));
    assert_eq!(guest.driver.queues[EVENT].used_pending(), 0);
    // A reset ends it all.
    guest.driver.device.quiesce();
    guest.driver.device.reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn streams_end_with_the_loop() {
    let mut guest = Guest::new();
    let (_, stream) = guest.accept(77);
    guest.driver.runner.shutdown();
    assert_eq!(blocking(stream).read(&mut [0]).unwrap(), 0);
}

#[test]
fn bad_states_are_refused() {
    let mut guest = Guest::new();
    let _held = guest.handle.hold(PORT).unwrap();
    for guest_port in 0..3 {
        guest.dial(PORT, guest_port);
    }
    let _stream = guest.accept(77);
    guest.driver.device.quiesce();
    let state = guest.driver.device.save().unwrap();
    let fresh = |cid| Vsock::new(VsockConfig::new(cid)).unwrap().0;
    let err = fresh(GUEST_CID + 1).restore(&state).unwrap_err();
    assert!(matches!(err, StateError::Mismatch { .. }), "{err}");
    state_tests::check_hostile(&state, || fresh(GUEST_CID));
    let dial = |port: u32| ((PORT, port), 0_u32, 0_u32);
    let restore = |local: u32, dials: &[((u32, u32), u32, u32)], resets: usize| {
        let resets = vec![(1_u32, 1_u32); resets];
        let body = postcard::to_stdvec(&(GUEST_CID, local, true, dials, resets)).unwrap();
        fresh(GUEST_CID).restore(&state_tests::seal(1, &body))
    };
    let dials: Vec<_> = (0..17).map(dial).collect();
    restore(1 << 30, &dials[..16], 3).unwrap();
    restore(1 << 29, &[], 0).unwrap_err();
    restore(1 << 30, &dials, 0).unwrap_err();
    restore(1 << 30, &[dial(1), dial(1)], 0).unwrap_err();
    restore(1 << 30, &[], 70_000).unwrap_err();
}
