//! The Unix sockets of the hybrid model.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::guest::{GUEST_CID, Guest, blocking};
use crate::virtio::vsock::VsockConfig;
use crate::virtio::vsock::packet::op;

struct Hybrid {
    guest: Guest,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn hybrid() -> Hybrid {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.vsock");
    let mut config = VsockConfig::new(GUEST_CID);
    config.uds_path = Some(path.clone());
    let mut guest = Guest::inactive(config);
    guest.activate();
    Hybrid {
        guest,
        path,
        _dir: dir,
    }
}

fn client(hybrid: &Hybrid) -> UnixStream {
    blocking(UnixStream::connect(&hybrid.path).unwrap())
}

#[test]
fn connect_protocol() {
    let mut hybrid = hybrid();
    let mut stream = client(&hybrid);
    stream.write_all(b"CONNECT 1024\nearly").unwrap();
    let request = hybrid.guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 1024);
    hybrid.guest.answer(&request, op::RESPONSE, 0, &[]);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.src_port));
    let (header, payload) = hybrid.guest.recv();
    assert_eq!((header.op, payload.as_slice()), (op::RW, &b"early"[..]));
    hybrid.guest.answer(&request, op::RW, 0, b"raw");
    let mut got = [0; 3];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"raw");
}

#[test]
fn a_socket_can_come_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.vsock");
    let mut guest = Guest::inactive(VsockConfig::new(GUEST_CID));
    guest.activate();
    guest.handle.bind(&path).unwrap();
    let again = guest.handle.bind(&dir.path().join("other")).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists);
    let mut stream = blocking(UnixStream::connect(&path).unwrap());
    stream.write_all(b"CONNECT 7\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).dst_port, 7);
    // The guest's own connects find sockets beside it.
    let other = UnixListener::bind(dir.path().join("vm.vsock_9")).unwrap();
    let request = guest.header(op::REQUEST, 9, 4000);
    guest.send_header(&request, &[]);
    guest.expect(op::RESPONSE);
    other.accept().unwrap();
    let handle = guest.handle.clone();
    drop(guest);
    assert!(!path.exists());
    let gone = handle.bind(&path).unwrap_err();
    assert_eq!(gone.kind(), std::io::ErrorKind::NotConnected);
}

#[test]
fn partial_lines_are_joined() {
    let mut hybrid = hybrid();
    let mut stream = client(&hybrid);
    for byte in b"CONNECT 52\n" {
        stream.write_all(&[*byte]).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(hybrid.guest.expect(op::REQUEST).dst_port, 52);
}

#[test]
fn a_refused_client_is_closed() {
    let mut hybrid = hybrid();
    let mut stream = client(&hybrid);
    stream.write_all(b"CONNECT 1\n").unwrap();
    let request = hybrid.guest.expect(op::REQUEST);
    hybrid.guest.answer(&request, op::RST, 0, &[]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_client_that_leaves_cancels() {
    let mut hybrid = hybrid();
    let mut stream = client(&hybrid);
    stream.write_all(b"CONNECT 1\n").unwrap();
    hybrid.guest.expect(op::REQUEST);
    drop(stream);
    hybrid.guest.expect(op::RST);
}

#[test]
fn garbage_and_long_lines_are_closed() {
    let hybrid = hybrid();
    for bad in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"CONNECT\n",
        b"CONNECT 99999999999\n",
        &[0; 4096],
    ] {
        let mut stream = client(&hybrid);
        // Our end may close before everything is written.
        let _ = stream.write_all(bad);
        match stream.read(&mut [0; 8]) {
            Ok(0) => {}
            Err(err) => assert_eq!(err.kind(), std::io::ErrorKind::ConnectionReset),
            Ok(other) => panic!("{other} bytes of an answer"),
        }
    }
}

#[test]
fn guests_reach_sockets_by_port() {
    let mut hybrid = hybrid();
    let mut path = hybrid.path.clone().into_os_string();
    path.push("_5000");
    let listener = UnixListener::bind(path).unwrap();
    let request = hybrid.guest.header(op::REQUEST, 5000, 77);
    hybrid.guest.send_header(&request, &[]);
    let response = hybrid.guest.expect(op::RESPONSE);
    let mut stream = blocking(listener.accept().unwrap().0);
    hybrid.guest.answer(&response, op::RW, 0, b"hello");
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    // A listener in the process comes first; a port without socket is refused.
    let mut own = hybrid.guest.handle.listen(5000).unwrap();
    hybrid.guest.connect(5000, 78, &mut own);
    let request = hybrid.guest.header(op::REQUEST, 5001, 79);
    hybrid.guest.send_header(&request, &[]);
    loop {
        // The dropped stream of the connect above may be announced first.
        match hybrid.guest.recv().0.op {
            op::SHUTDOWN => {}
            other => {
                assert_eq!(other, op::RST);
                break;
            }
        }
    }
}

#[test]
fn clients_may_come_before_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let mut config = VsockConfig::new(GUEST_CID);
    config.uds_path = Some(path.clone());
    let mut guest = Guest::inactive(config);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    guest.activate();
    assert_eq!(guest.expect(op::REQUEST).dst_port, 9);
    drop(guest);
    assert!(!path.exists());
}
