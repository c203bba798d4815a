//! The standard streams of a guest.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use wasmtime_wasi::cli::{AsyncStdinStream, IsTerminal, StdinStream, StdoutStream};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

/// Where a guest reads from.
pub type Reader = Box<dyn AsyncRead + Send + Sync + Unpin>;

/// Where a guest writes to.
pub type Writer = Box<dyn AsyncWrite + Send + Sync + Unpin>;

/// The streams of a guest. `Default`: nothing to read, output is discarded.
#[derive(Default)]
pub struct Stdio {
    /// What the guest reads.
    pub stdin: Option<Reader>,
    /// What it writes.
    pub stdout: Option<Writer>,
    /// What it writes about itself; the host adds why it trapped.
    pub stderr: Option<Writer>,
    /// Whether the guest is told that its streams are a terminal.
    pub terminal: bool,
}

impl std::fmt::Debug for Stdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stdio")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .field("terminal", &self.terminal)
            .finish()
    }
}

/// Bytes that a guest may write ahead of its reader.
const BUFFER_BYTES: usize = 64 << 10;

/// An output, shared by all handles that a guest has of it.
#[derive(Clone)]
pub(crate) struct Output {
    inner: Arc<Mutex<Inner>>,
    terminal: bool,
}

struct Inner {
    /// `None`: output is discarded.
    writer: Option<Writer>,
    pending: BytesMut,
    closed: bool,
}

impl Output {
    pub(crate) fn new(writer: Option<Writer>, terminal: bool) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                writer,
                pending: BytesMut::new(),
                closed: false,
            })),
            terminal,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes text of the host after what the guest has written.
    pub(crate) async fn append(&self, text: &str) {
        {
            let mut inner = self.lock();
            if inner.closed || inner.writer.is_none() {
                return;
            }
            inner.pending.extend_from_slice(text.as_bytes());
        }
        self.drained().await;
    }

    /// Waits until the reader has taken everything, or is gone.
    pub(crate) async fn drained(&self) {
        std::future::poll_fn(|cx| self.lock().poll_drain(cx)).await;
    }

    /// Lets go of the writer: its reader sees the end.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.writer = None;
        inner.pending = BytesMut::new();
    }
}

impl Inner {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(writer) = &mut self.writer else {
            self.pending.clear();
            return Poll::Ready(());
        };
        while !self.closed && !self.pending.is_empty() {
            match ready!(Pin::new(&mut *writer).poll_write(cx, &self.pending)) {
                Ok(0) | Err(_) => self.closed = true,
                Ok(written) => self.pending.advance(written),
            }
        }
        if self.closed {
            self.pending.clear();
            return Poll::Ready(());
        }
        // A writer with a buffer of its own keeps nothing back.
        if ready!(Pin::new(writer).poll_flush(cx)).is_err() {
            self.closed = true;
        }
        Poll::Ready(())
    }

    fn try_drain(&mut self) {
        let _ = self.poll_drain(&mut Context::from_waker(Waker::noop()));
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        self.terminal
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {
        self.drained().await;
    }
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(StreamError::Closed);
        }
        if inner.writer.is_some() {
            inner.pending.extend_from_slice(&bytes);
            inner.try_drain();
        }
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        // `ready` means that everything is flushed.
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        let mut inner = self.lock();
        inner.try_drain();
        if inner.closed {
            return Err(StreamError::Closed);
        }
        Ok(BUFFER_BYTES.saturating_sub(inner.pending.len()))
    }
}

impl AsyncWrite for Output {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        ready!(inner.poll_drain(cx));
        if inner.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let taken = bytes.len().min(BUFFER_BYTES);
        inner
            .pending
            .extend_from_slice(bytes.get(..taken).unwrap_or_default());
        inner.try_drain();
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().poll_drain(cx).map(Ok)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

/// An input that may be a terminal.
pub(crate) struct Input {
    stream: AsyncStdinStream,
    terminal: bool,
}

impl Input {
    /// Must be called on the event loop that reads.
    pub(crate) fn new(reader: Reader, terminal: bool) -> Self {
        Self {
            stream: AsyncStdinStream::new(reader),
            terminal,
        }
    }
}

impl IsTerminal for Input {
    fn is_terminal(&self) -> bool {
        self.terminal
    }
}

impl StdinStream for Input {
    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        self.stream.async_stream()
    }

    fn p2_stream(&self) -> Box<dyn InputStream> {
        self.stream.p2_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn output_waits_for_its_reader_and_outlives_it() {
        let (mut reader, writer) = tokio::io::duplex(4);
        let mut output = Output::new(Some(Box::new(writer)), false);
        assert_eq!(output.check_write().unwrap(), BUFFER_BYTES);
        output.write(Bytes::from_static(b"0123456789")).unwrap();
        assert_eq!(output.check_write().unwrap(), BUFFER_BYTES - 6);
        let mut read = [0; 10];
        let (drained, all) = tokio::join!(output.drained(), reader.read_exact(&mut read));
        let () = drained;
        all.unwrap();
        assert_eq!(&read, b"0123456789");
        drop(reader);
        let _ = output.write(Bytes::from_static(b"lost"));
        assert!(matches!(output.check_write(), Err(StreamError::Closed)));
        output.drained().await;
    }
}
