use std::io::{Read, Write};

use tokio::sync::oneshot;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::buffers::Direction;
use super::super::packet::HEADER_LEN;
use super::*;

const READABLE: Ready = Ready {
    readable: true,
    writable: false,
    hangup: false,
};

fn packet(op: u16, buf_alloc: u32, fwd_cnt: u32, len: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: CID_HOST,
        src_port: 5,
        dst_port: 6,
        len,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc,
        fwd_cnt,
    }
}

fn open(memory: &GuestMemoryMmap<()>, peer_buf_alloc: u32) -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ports = Ports { local: 6, peer: 5 };
    let request = packet(op::REQUEST, peer_buf_alloc, 0, 0);
    let mut connection = Connection::accepted(ports, 3, ours, &request, 64 * 1024);
    let response = connection
        .fill(&buffers(memory, Direction::ToGuest))
        .unwrap();
    assert_eq!(response.op, op::RESPONSE);
    (connection, theirs)
}

fn memory() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap()
}

/// One buffer of a whole packet.
fn buffers(memory: &GuestMemoryMmap<()>, direction: Direction) -> Buffers<'_> {
    let flags = if direction == Direction::ToGuest {
        2
    } else {
        0
    };
    let len = u32::try_from(HEADER_LEN + MAX_PAYLOAD).unwrap();
    let mut buffers = Buffers::default();
    let chain = std::iter::once(Descriptor::new(0, len, flags, 0));
    buffers.load(memory, chain, direction).unwrap();
    buffers
}

#[test]
fn data_flows_within_the_credit() {
    let memory = memory();
    let (mut connection, mut host) = open(&memory, 10);
    host.write_all(&[1; 25]).unwrap();
    connection.ready(READABLE);
    let to = buffers(&memory, Direction::ToGuest);
    let header = connection.fill(&to).unwrap();
    assert_eq!((header.op, header.len), (op::RW, 10));
    assert_eq!(connection.fill(&to).unwrap().op, op::CREDIT_REQUEST);
    assert!(!connection.wants_to_send());
    connection.receive(&packet(op::CREDIT_UPDATE, 100, 10, 0), &to);
    assert_eq!(connection.fill(&to).unwrap().len, 15);

    let text = b"to the host";
    memory
        .write_slice(text, GuestAddress(HEADER_LEN as u64))
        .unwrap();
    let from = buffers(&memory, Direction::FromGuest);
    connection.receive(&packet(op::RW, 100, 25, 11), &from);
    let mut got = [0; 11];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, text);
    connection.receive(&packet(op::CREDIT_REQUEST, 100, 25, 0), &from);
    assert_eq!(connection.fill(&to).unwrap().fwd_cnt, 11);
}

#[test]
fn credit_is_announced_when_a_quarter_is_free() {
    let memory = memory();
    let (mut connection, _host) = open(&memory, 1000);
    let from = buffers(&memory, Direction::FromGuest);
    connection.receive(&packet(op::RW, 0, 0, 16 * 1024 - 1), &from);
    assert!(!connection.wants_to_send());
    connection.receive(&packet(op::RW, 0, 0, 1), &from);
    let to = buffers(&memory, Direction::ToGuest);
    let update = connection.fill(&to).unwrap();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 16 * 1024));
    assert!(!connection.wants_to_send());
}

#[test]
fn a_guest_that_never_answers_times_out() {
    let memory = memory();
    let (ours, stream) = UnixStream::pair().unwrap();
    let (reply, mut result) = oneshot::channel();
    let opener = Opener::InProcess {
        waiter: Waiter::new(reply),
        stream,
    };
    let ports = Ports { local: 1, peer: 2 };
    let mut connection = Connection::requested(ports, 3, ours, opener, 4096);
    let left = connection.deadline().unwrap() - Instant::now();
    assert!(left <= CONNECT_TIMEOUT);
    let to = buffers(&memory, Direction::ToGuest);
    assert_eq!(connection.fill(&to).unwrap().op, op::REQUEST);
    connection.expire();
    assert!(connection.is_closed());
    assert_eq!(connection.parting_reset().unwrap().op, op::RST);
    assert!(connection.parting_reset().is_none());
    let err = result.try_recv().unwrap().unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn an_unconfirmed_close_times_out() {
    let memory = memory();
    let (mut connection, host) = open(&memory, 1000);
    assert_eq!(connection.deadline(), None);
    drop(host);
    connection.ready(Ready {
        readable: true,
        writable: false,
        hangup: true,
    });
    let to = buffers(&memory, Direction::ToGuest);
    let shutdown = connection.fill(&to).unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    assert!(connection.deadline().unwrap() - Instant::now() <= CLOSE_TIMEOUT);
    connection.expire();
    assert!(connection.is_closed());
    assert_eq!(connection.parting_reset().unwrap().op, op::RST);
}
