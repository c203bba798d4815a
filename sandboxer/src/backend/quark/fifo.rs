//! The streams of a process in Quark: fifos in its container's folder.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use agent_api::rpc;
use agent_api::stream::StreamKind;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, mknodat, openat, unlinkat};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::pipe::{Receiver, Sender};
use vmm_core::vm::GuestStream;

/// All that a process can have.
const KINDS: [StreamKind; 3] = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr];

/// Name of a fifo in the container's folder.
pub(super) fn name(exec_id: &str, kind: StreamKind) -> String {
    match exec_id {
        "" => kind.as_str().to_owned(),
        exec_id => format!("{exec_id}-{}", kind.as_str()),
    }
}

/// The fifos of a process, our ends of them open: Quark holds a lock while it opens its own.
#[derive(Debug, Default)]
pub(super) struct Fifos {
    ends: Vec<(StreamKind, End)>,
    /// Without a writer an output would be at its end before the process has begun.
    keepers: Vec<Sender>,
}

impl Fifos {
    /// Makes those that are wanted in the container's folder.
    pub(super) fn make(folder: &OwnedFd, exec_id: &str, wanted: &rpc::Stdio) -> io::Result<Self> {
        let mut fifos = Self::default();
        for kind in KINDS {
            let wanted = match kind {
                StreamKind::Stdin => wanted.stdin,
                StreamKind::Stdout => wanted.stdout,
                StreamKind::Stderr => wanted.stderr,
            };
            if !wanted {
                continue;
            }
            let name = name(exec_id, kind);
            mknodat(folder, &name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
            fifos.ends.push((kind, End::open(folder, exec_id, kind)?));
            if kind != StreamKind::Stdin {
                fifos.keepers.push(sender(folder, &name)?);
            }
        }
        Ok(fifos)
    }

    /// Takes an end, once.
    pub(super) fn take(&mut self, kind: StreamKind) -> Option<End> {
        let found = self.ends.iter().position(|(known, _)| *known == kind)?;
        Some(self.ends.swap_remove(found).1)
    }

    /// The process has its ends open.
    pub(super) fn started(&mut self) {
        self.keepers.clear();
    }
}

/// Removes the fifos of a process.
pub(super) fn remove(folder: &OwnedFd, exec_id: &str) {
    for kind in KINDS {
        // There may be none.
        let _ = unlinkat(folder, name(exec_id, kind), AtFlags::empty());
    }
}

/// Our end of a fifo.
#[derive(Debug)]
pub(super) enum End {
    /// From the process.
    Output(Receiver),
    /// To the process; none once it was shut down.
    Input(Option<Sender>),
}

impl End {
    /// Opens the fifo of a stream.
    pub(super) fn open(folder: &OwnedFd, exec_id: &str, kind: StreamKind) -> io::Result<Self> {
        let name = name(exec_id, kind);
        if kind == StreamKind::Stdin {
            return Ok(Self::Input(Some(sender(folder, &name)?)));
        }
        let fd = openat(folder, name, OFlags::RDONLY | FLAGS, Mode::empty())?;
        Ok(Self::Output(Receiver::from_owned_fd(fd)?))
    }

    pub(super) fn into_stream(self) -> Box<dyn GuestStream> {
        Box::new(self)
    }
}

const FLAGS: OFlags = OFlags::NONBLOCK
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Also for reading: otherwise it could only be opened after a reader has come.
fn sender(folder: &OwnedFd, name: &str) -> io::Result<Sender> {
    let fd = openat(folder, name, OFlags::RDWR | FLAGS, Mode::empty())?;
    Sender::from_owned_fd(fd)
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Output(receiver) => Pin::new(receiver).poll_read(cx, buf),
            Self::Input(_) => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Input(Some(sender)) => Pin::new(sender).poll_write(cx, data),
            _ => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Self::Input(sender) = self.get_mut() {
            drop(sender.take());
        }
        Poll::Ready(Ok(()))
    }
}
