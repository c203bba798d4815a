//! Where the agent dials and listens: AF_VSOCK in a guest, Unix sockets elsewhere.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, accept4, bind, connect,
    getsockopt, listen, socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::fd::Fd;
use crate::sys;

/// An address to dial or to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// AF_VSOCK.
    Vsock {
        /// Context id; 2 is the host.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// A Unix stream socket, for running the agent outside a VM.
    Unix(PathBuf),
}

impl Endpoint {
    const fn family(&self) -> AddressFamily {
        match self {
            Self::Vsock { .. } => AddressFamily::Vsock,
            Self::Unix(_) => AddressFamily::Unix,
        }
    }

    fn socket(&self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        Ok(socket(self.family(), SockType::Stream, flags, None)?)
    }

    /// Connects; fails at once when nobody listens. A host that holds the attempt instead
    /// of answering it is saving this machine: its clones are answered, however much later.
    pub async fn connect(&self) -> io::Result<Fd> {
        let socket = self.socket()?;
        let started = match self {
            Self::Vsock { cid, port } => {
                sys::connect_without_deadline(&socket)?;
                connect(socket.as_raw_fd(), &VsockAddr::new(*cid, *port))
            }
            Self::Unix(path) => connect(socket.as_raw_fd(), &UnixAddr::new(path)?),
        };
        let mut fd = Fd::new(socket);
        match started {
            Ok(()) => return Ok(fd),
            Err(Errno::EINPROGRESS) => {}
            Err(e) => return Err(e.into()),
        }
        fd.writable().await?;
        match getsockopt(&fd, sockopt::SocketError)? {
            0 => Ok(fd),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Listens.
    pub fn listen(&self) -> io::Result<Listener> {
        let socket = self.socket()?;
        match self {
            Self::Vsock { cid, port } => {
                bind(socket.as_raw_fd(), &VsockAddr::new(*cid, *port))?;
            }
            Self::Unix(path) => bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?,
        }
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(Listener(sys::polled(Arc::new(socket), Interest::READABLE)?))
    }
}

const BACKLOG: i32 = 128;
/// Between attempts to accept when the process or the machine is out of something.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket.
#[derive(Debug)]
pub struct Listener(AsyncFd<Arc<OwnedFd>>);

impl Listener {
    /// The next connection.
    pub async fn accept(&self) -> io::Result<Fd> {
        loop {
            let mut guard = self.0.readable().await?;
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            match accept4(guard.get_inner().as_raw_fd(), flags) {
                Ok(fd) => return Ok(Fd::new(sys::own_fd(fd))),
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(e @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)) => {
                    // Nothing announces that there is room again.
                    warn!("no connection can be accepted: {e}");
                    tokio::time::sleep(FULL_PAUSE).await;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}
