//! The Unix sockets of the hybrid model.
//!
//! Host to guest: a client connects to the device's socket, sends `CONNECT <port>\n` and
//! reads `OK <host_port>\n` once the guest has accepted; a refused connect is a closed
//! socket. Guest to host: a connect to host port N goes to the socket `<path>_N`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, recv,
    socket,
};
use nix::sys::stat::{Mode, fchmod};

/// Longest `CONNECT` line, its newline included: "CONNECT 4294967295\r\n" has 20 bytes.
const MAX_LINE: usize = 32;
/// Clients the kernel queues while the device is busy or not yet active.
const BACKLOG: i32 = 128;

/// The bound socket; its file is removed with it.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds `path`, accessible to this user only.
    ///
    /// # Errors
    /// `AddrInUse` when the file exists (the caller knows whether it is stale),
    /// `InvalidInput` when the path is too long for a socket address, or as bind(2).
    pub fn bind(path: &Path) -> io::Result<Self> {
        let context = |what: &str, err: io::Error| {
            io::Error::new(err.kind(), format!("{what} {}: {err}", path.display()))
        };
        let socket = stream_socket()?;
        // Linux gives the file the mode of the socket's inode, so that there is no moment
        // at which others can connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let address = UnixAddr::new(path).map_err(|err| {
            context(
                "the socket path is too long (at most 107 bytes):",
                err.into(),
            )
        })?;
        bind(socket.as_raw_fd(), &address).map_err(|err| match err {
            nix::Error::EADDRINUSE => io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "{} exists: another VM uses this vsock socket, or an earlier one left it \
                     behind and it has to be removed",
                    path.display()
                ),
            ),
            err => context("cannot bind the vsock socket", err.into()),
        })?;
        // From here on the file is ours to remove.
        let bound = Self {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
        };
        listen(&bound.listener, Backlog::new(BACKLOG)?)
            .map_err(|err| context("cannot listen on", err.into()))?;
        Ok(bound)
    }

    /// Where it is bound.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket again, for the event loop.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed the directory already.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// Connects to the socket that serves `host_port`, without ever blocking.
///
/// # Errors
/// As connect(2): there is no such socket, or its backlog is full.
pub fn connect_to_port(base: &Path, host_port: u32) -> io::Result<UnixStream> {
    let mut path = OsString::from(base);
    path.push(format!("_{host_port}"));
    let socket = stream_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
    Ok(UnixStream::from(socket))
}

/// A client that has not yet said where it wants to go.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a readable client leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Handshake {
    /// More is to come.
    Incomplete,
    /// The guest port it wants.
    Connect(u32),
    /// Not our protocol, or gone: close it.
    Invalid,
}

impl Client {
    /// A client that has just connected.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Its socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The socket, positioned after the line.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads on. Never takes a byte beyond the newline: those belong to the guest.
    pub fn read(&mut self) -> Handshake {
        let mut peeked = [0; MAX_LINE];
        let room = MAX_LINE.saturating_sub(self.line.len());
        let Some(window) = peeked.get_mut(..room) else {
            return Handshake::Invalid;
        };
        let flags = MsgFlags::MSG_DONTWAIT;
        let seen = match recv(self.stream.as_raw_fd(), window, flags | MsgFlags::MSG_PEEK) {
            Ok(0) => return Handshake::Invalid,
            Ok(seen) => seen,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Handshake::Incomplete,
            Err(_) => return Handshake::Invalid,
        };
        let newline = window.iter().take(seen).position(|&byte| byte == b'\n');
        let take = newline.map_or(seen, |at| at.saturating_add(1));
        let Some(window) = window.get_mut(..take) else {
            return Handshake::Invalid;
        };
        match recv(self.stream.as_raw_fd(), window, flags) {
            Ok(got) if got == take => self.line.extend_from_slice(window),
            _ => return Handshake::Invalid,
        }
        if newline.is_some() {
            parse_connect(&self.line).map_or(Handshake::Invalid, Handshake::Connect)
        } else if self.line.len() >= MAX_LINE {
            Handshake::Invalid
        } else {
            Handshake::Incomplete
        }
    }
}

/// The port of a `CONNECT <port>` line.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?;
    if !verb.eq_ignore_ascii_case("connect") || words.next().is_some() {
        return None;
    }
    // `parse` alone would take a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

/// Accepts one waiting client.
///
/// # Errors
/// As accept4(2); `WouldBlock` when none waits.
pub fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = nix::sys::socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just returned this fd; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(UnixStream::from(fd))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn connect_lines() {
        assert_eq!(parse_connect(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse_connect(b"connect 4294967295\r\n"), Some(u32::MAX));
        for bad in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT x\n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 1 2\n",
            b"CONNECT 4294967296\n",
            b"OPEN 1\n",
            b"CONNECT \xff\n",
        ] {
            assert_eq!(parse_connect(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn client_reads_no_further_than_its_line() {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let mut client = Client::new(ours);
        assert_eq!(client.read(), Handshake::Incomplete);
        peer.write_all(b"CONN").unwrap();
        assert_eq!(client.read(), Handshake::Incomplete);
        peer.write_all(b"ECT 7\nearly data").unwrap();
        assert_eq!(client.read(), Handshake::Connect(7));
        drop(peer);
        let mut rest = String::new();
        client.into_stream().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "early data");
    }

    #[test]
    fn garbage_and_long_lines_are_invalid() {
        for bad in [&b"GET / HTTP/1.1\r\n"[..], &[b'a'; 200]] {
            let (mut peer, ours) = UnixStream::pair().unwrap();
            peer.write_all(bad).unwrap();
            assert_eq!(Client::new(ours).read(), Handshake::Invalid);
        }
        let (peer, ours) = UnixStream::pair().unwrap();
        drop(peer);
        assert_eq!(Client::new(ours).read(), Handshake::Invalid);
    }

    #[test]
    fn listener_is_private_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let err = Listener::bind(&path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AddrInUse);
        assert!(err.to_string().contains("v.sock"), "{err}");
        // The failed bind has not removed the file.
        assert!(path.exists());
        drop(listener);
        assert!(!path.exists());
        let long = dir.path().join("x".repeat(120));
        let err = Listener::bind(&long).unwrap_err();
        assert!(err.to_string().contains("too long"), "{err}");
    }
}
