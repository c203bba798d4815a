//! Half-close, close, reset: 5.10.6.5.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::guest::{Guest, blocking, pattern};
use crate::virtio::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, op};

#[test]
fn host_half_close_reaches_the_guest_after_the_data() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let (header, payload) = guest.recv();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, &b"last words"[..])
    );
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    // The other direction goes on.
    guest.answer(&of, op::RW, 0, b"an answer");
    guest.answer(&of, op::SHUTDOWN, SHUTDOWN_BOTH, &[]);
    guest.expect(op::RST);
    let mut got = String::new();
    stream.read_to_string(&mut got).unwrap();
    assert_eq!(got, "an answer");
}

#[test]
fn guest_half_close_reaches_the_host_after_all_data() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    // More than the socket takes, so that some of it waits in the device.
    let bytes = pattern(400 * 1024);
    for part in bytes.chunks(16 * 1024) {
        guest.answer(&of, op::RW, 0, part);
    }
    guest.answer(&of, op::SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == bytes);
    stream.write_all(b"still open").unwrap();
    loop {
        let (header, payload) = guest.recv();
        match header.op {
            op::CREDIT_UPDATE => {}
            op::RW => {
                assert_eq!(payload, b"still open");
                break;
            }
            other => panic!("op {other}"),
        }
    }
}

#[test]
fn a_full_close_by_the_guest_loses_no_byte() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let bytes = pattern(400 * 1024);
    for part in bytes.chunks(16 * 1024) {
        guest.answer(&of, op::RW, 0, part);
    }
    guest.answer(&of, op::SHUTDOWN, SHUTDOWN_BOTH, &[]);
    // Confirmed at once, although the host has read nothing yet.
    while guest.recv().0.op != op::RST {}
    // The guest may use the ports again.
    guest.answer(&of, op::CREDIT_REQUEST, 0, &[]);
    guest.expect(op::RST);
    let mut got = Vec::new();
    blocking(stream).read_to_end(&mut got).unwrap();
    assert!(got == bytes);
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_hosts_pipe() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    guest.answer(&of, op::SHUTDOWN, SHUTDOWN_RCV, &[]);
    guest.answer(&of, op::RW, 0, b"x");
    let mut got = [0];
    stream.read_exact(&mut got).unwrap();
    let err = stream.write_all(b"unwanted").unwrap_err();
    assert_eq!(err.kind(), ErrorKind::BrokenPipe);
    // Nothing is left to do once the host closes as well.
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
}

#[test]
fn a_host_close_shuts_both_directions_and_swallows_late_data() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.recv().1, b"bye");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.answer(&of, op::RW, 0, &[1; 1000]);
    // Confirmed by the guest: the connection is gone.
    guest.answer(&of, op::RST, 0, &[]);
    guest.answer(&of, op::RW, 0, b"x");
    guest.expect(op::RST);
}

#[test]
fn a_host_that_stops_reading_is_announced() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    let mut stream = blocking(stream);
    stream.shutdown(Shutdown::Read).unwrap();
    guest.answer(&of, op::RW, 0, b"nobody reads this");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_RCV);
    stream.write_all(b"but I still write").unwrap();
    assert_eq!(guest.recv().1, b"but I still write");
}

#[test]
fn a_reset_by_the_guest_ends_the_stream() {
    let mut guest = Guest::new();
    let (of, stream) = guest.accept(1);
    guest.answer(&of, op::RW, 0, b"rest");
    guest.answer(&of, op::RST, 0, &[]);
    let mut got = String::new();
    blocking(stream).read_to_string(&mut got).unwrap();
    assert_eq!(got, "rest");
}

#[test]
fn data_after_the_guests_own_shutdown_is_a_violation() {
    let mut guest = Guest::new();
    let (of, _stream) = guest.accept(1);
    guest.answer(&of, op::SHUTDOWN, SHUTDOWN_SEND, &[]);
    guest.answer(&of, op::RW, 0, b"x");
    guest.expect(op::RST);
}
