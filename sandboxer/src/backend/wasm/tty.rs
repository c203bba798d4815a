//! A terminal's streams, as pods connect them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use wasm_host::Terminal;

/// What a user types to end the input.
const END_OF_FILE: &[u8] = &[4];

/// The user's side of a terminal, which tells when the user interrupts.
pub(super) struct TerminalStream<F> {
    terminal: Terminal,
    interrupt: F,
}

impl<F: Fn()> TerminalStream<F> {
    pub(super) fn new(terminal: Terminal, interrupt: F) -> Self {
        Self {
            terminal,
            interrupt,
        }
    }
}

impl<F: Unpin> AsyncRead for TerminalStream<F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.terminal).poll_read(cx, buffer)
    }
}

impl<F: Fn() + Unpin> AsyncWrite for TerminalStream<F> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.terminal).poll_write(cx, bytes));
        if let Ok(written) = written
            && Terminal::interrupts(bytes.get(..written).unwrap_or_default())
        {
            (self.interrupt)();
        }
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.terminal).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.terminal)
            .poll_write(cx, END_OF_FILE)
            .map_ok(|_| ())
    }
}
