//! A terminal for a guest: line discipline and echo by the kernel, as for any process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stdio::Stdio;

nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, Winsize);

/// What interrupts: no process is in the terminal's foreground, so the host has to see it.
const INTERRUPT: u8 = 3;

/// The user's side of a terminal. Clones are the same terminal; the guest's output ends when
/// the guest does.
#[derive(Clone, Debug)]
pub struct Terminal {
    fd: Arc<AsyncFd<File>>,
}

impl Terminal {
    /// Makes a terminal, and the streams that a guest has of it. Must be called on an event
    /// loop.
    ///
    /// # Errors
    /// The host has no terminal left.
    pub fn open() -> io::Result<(Self, Stdio)> {
        let OpenptyResult { master, slave } = openpty(None, None)?;
        let mut modes = tcgetattr(&slave)?;
        modes.local_flags.remove(LocalFlags::ISIG);
        tcsetattr(&slave, SetArg::TCSANOW, &modes)?;
        let guest = Self::over(slave)?;
        let stdio = Stdio {
            stdin: Some(Box::new(guest.clone())),
            stdout: Some(Box::new(guest.clone())),
            stderr: Some(Box::new(guest)),
            terminal: true,
        };
        Ok((Self::over(master)?, stdio))
    }

    fn over(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        // SAFETY: the file owns its descriptor, and stays in the `AsyncFd` until both go.
        let fd = unsafe { AsyncFd::register(File::from(fd)) }?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Sets its size in characters.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the file is a terminal and `size` is what TIOCSWINSZ reads.
        unsafe { set_window_size(self.fd.get_ref().as_raw_fd(), &raw const size) }?;
        Ok(())
    }

    /// Whether what a user typed asks to interrupt the guest.
    #[must_use]
    pub fn interrupts(typed: &[u8]) -> bool {
        typed.contains(&INTERRUPT)
    }
}

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref().as_fd(), unfilled)?));
            match read {
                Ok(Ok(bytes)) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                // The other side is closed: Linux says EIO.
                Ok(Err(e)) if e.raw_os_error() == Some(nix::libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(e)) => return Poll::Ready(Err(e)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            let write = |fd: &AsyncFd<File>| Ok(rustix::io::write(fd.get_ref().as_fd(), bytes)?);
            if let Ok(written) = guard.try_io(write) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_terminal_echoes_edits_lines_and_ends() {
        let (mut user, mut guest) = Terminal::open().unwrap();
        user.resize(100, 30).unwrap();
        user.write_all(b"ax\x7fb\r").await.unwrap();
        let mut line = [0; 16];
        let mut stdin = guest.stdin.take().unwrap();
        let read = stdin.read(&mut line).await.unwrap();
        assert_eq!(&line[..read], b"ab\n", "the kernel took the x away");
        guest
            .stdout
            .as_mut()
            .unwrap()
            .write_all(b"hi\n")
            .await
            .unwrap();
        drop((stdin, guest));
        let mut seen = String::new();
        user.read_to_string(&mut seen).await.unwrap();
        assert!(
            seen.starts_with("ax") && seen.ends_with("hi\r\n"),
            "{seen:?}"
        );
    }
}
