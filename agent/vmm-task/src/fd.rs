//! Non-blocking descriptors: pipes, terminals and sockets, all read and written alike.
//!
//! A descriptor joins the event loop only when an operation has to wait. Streams that
//! never wait (most standard outputs) then cost no epoll calls, which matters on hosts
//! where each guest system call takes a millisecond.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};

use crate::sys;

const EITHER: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Numbers of all open [`Fd`]s.
static OPEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

fn open_fds() -> MutexGuard<'static, BTreeSet<RawFd>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes every [`Fd`] in a forked child that waits to be started. Its copies would keep
/// other processes' streams open: a pipe ends when its last writer is gone.
pub fn close_all_in_child() {
    for fd in open_fds().iter() {
        sys::close_in_child(*fd);
    }
}

/// An owned descriptor in non-blocking mode.
#[derive(Debug)]
pub struct Fd {
    // Dropped first: leaves the event loop before the descriptor can close.
    polled: Option<AsyncFd<Arc<OwnedFd>>>,
    fd: Arc<OwnedFd>,
}

impl Fd {
    /// Takes a descriptor that already has `O_NONBLOCK` set.
    pub fn new(fd: OwnedFd) -> Self {
        open_fds().insert(fd.as_raw_fd());
        Self {
            polled: None,
            fd: Arc::new(fd),
        }
    }

    /// Takes a descriptor and sets `O_NONBLOCK` on it.
    pub fn from_blocking(fd: OwnedFd) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self::new(fd))
    }

    /// The descriptor itself, shared.
    pub fn shared(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    fn polled(&mut self) -> io::Result<&AsyncFd<Arc<OwnedFd>>> {
        match self.polled {
            Some(ref polled) => Ok(polled),
            None => Ok(self
                .polled
                .insert(sys::polled(Arc::clone(&self.fd), EITHER)?)),
        }
    }

    /// Reads what is there now; `None` when that is nothing.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match nix::unistd::read(&*self.fd, buf) {
                Ok(n) => return Ok(Some(n)),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads at least one byte; 0 is end of file.
    pub async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        AsyncReadExt::read(self, buf).await
    }

    /// Writes everything.
    pub async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        AsyncWriteExt::write_all(self, data).await
    }

    /// Waits until the descriptor can be written, or has failed.
    pub async fn writable(&mut self) -> io::Result<()> {
        let mut guard = self.polled()?.writable().await?;
        guard.clear_ready();
        Ok(())
    }

    /// Half-closes a socket: the peer reads end of file after the last byte.
    pub fn finish(&self) {
        // A peer that is gone already has its end of file.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Write);
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        open_fds().remove(&self.fd.as_raw_fd());
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsyncRead for Fd {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = self.get_mut().polled()?;
        loop {
            let mut guard = ready!(polled.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            match nix::unistd::read(guard.get_inner(), space) {
                Ok(n) => {
                    // Less than asked for: drained, so do not spend a read to hear it.
                    if n > 0 && n < space.len() {
                        guard.clear_ready();
                    }
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }
}

impl AsyncWrite for Fd {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        loop {
            match nix::unistd::write(&*me.fd, data) {
                Ok(n) => return Poll::Ready(Ok(n)),
                Err(Errno::EAGAIN) => ready!(me.polled()?.poll_write_ready(cx))?.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::pipe2;

    use super::*;

    fn pipe() -> (Fd, Fd) {
        let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (Fd::new(r), Fd::new(w))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_full_pipe_makes_the_writer_wait_and_loses_nothing() {
        let (mut r, mut w) = pipe();
        let data: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        let expected = data.clone();
        let writer = tokio::spawn(async move { w.write_all(&data).await });
        let mut got = Vec::new();
        let mut buf = [0; 1000];
        loop {
            let n = r.read(&mut buf).await.unwrap();
            if n == 0 {
                break;
            }
            got.extend_from_slice(&buf[..n]);
        }
        writer.await.unwrap().unwrap();
        assert_eq!(got, expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn end_of_file_after_a_partial_read_is_seen() {
        let (mut r, mut w) = pipe();
        w.write_all(b"last words").await.unwrap();
        drop(w);
        let mut buf = [0; 64];
        assert_eq!(r.read(&mut buf).await.unwrap(), 10);
        assert_eq!(r.read(&mut buf).await.unwrap(), 0);
    }

    #[test]
    fn try_read_tells_nothing_from_end() {
        let (r, w) = pipe();
        let mut buf = [0; 8];
        assert_eq!(r.try_read(&mut buf).unwrap(), None);
        drop(w);
        assert_eq!(r.try_read(&mut buf).unwrap(), Some(0));
    }
}
