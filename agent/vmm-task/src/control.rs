//! The control connection: dialled by the agent, served by it, dialled again when it breaks.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::sync::{Notify, oneshot};
use tracing::{debug, info};

use crate::fd::Fd;
use crate::net::Endpoint;

/// Pause after the first failed attempt; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Holds a request frame's header and, mostly, its body: one read instead of two.
const READ_BUFFER: usize = 4096;

/// One dialled connection. It tells when it broke.
#[derive(Debug)]
pub struct Control {
    io: BufReader<Fd>,
    broken: Option<oneshot::Sender<()>>,
    lost: Arc<Notify>,
}

impl Control {
    /// Notes the end of the connection.
    fn end(&mut self) {
        if let Some(broken) = self.broken.take() {
            self.lost.notify_waiters();
            // The dialler is gone only when the agent is.
            let _ = broken.send(());
        }
    }
}

impl AsyncRead for Control {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        let before = buf.filled().len();
        let room = buf.remaining();
        let poll = Pin::new(&mut me.io).poll_read(cx, buf);
        match &poll {
            Poll::Ready(Ok(())) if room > 0 && buf.filled().len() == before => me.end(),
            Poll::Ready(Err(_)) => me.end(),
            _ => {}
        }
        poll
    }
}

impl AsyncWrite for Control {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        let poll = Pin::new(&mut me.io).poll_write(cx, data);
        if let Poll::Ready(Err(_)) = &poll {
            me.end();
        }
        poll
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
    }
}

/// Connections to the host, one at a time, for ever. `lost` is told when one breaks.
pub fn connections(
    host: Endpoint,
    lost: Arc<Notify>,
) -> impl Stream<Item = io::Result<Control>> + Send + 'static {
    stream::unfold(None::<oneshot::Receiver<()>>, move |previous| {
        let (host, lost) = (host.clone(), Arc::clone(&lost));
        async move {
            if let Some(broken) = previous {
                // An error is the connection's end as well.
                let _ = broken.await;
                info!("the host went away, dialling again");
            }
            let fd = dial(&host).await;
            let (sender, receiver) = oneshot::channel();
            let control = Control {
                io: BufReader::with_capacity(READ_BUFFER, fd),
                broken: Some(sender),
                lost,
            };
            Some((Ok(control), Some(receiver)))
        }
    })
}

/// Dials until the host answers. An attempt has no deadline: the host answers or refuses at
/// once, unless it holds the attempt on purpose. After a refusal, nothing announces that it listens again, so this is the one
/// place that retries by the clock, ever more slowly.
async fn dial(host: &Endpoint) -> Fd {
    let mut pause = FIRST_PAUSE;
    loop {
        match host.connect().await {
            Ok(fd) => return fd,
            Err(e) => debug!("dialling the host: {e}"),
        }
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2).min(MAX_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_broken_connection_is_dialled_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host");
        let lost = Arc::new(Notify::new());
        let mut dialled = Box::pin(connections(Endpoint::Unix(path.clone()), lost));
        // The host listens only after the first attempts have failed.
        let host = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(30)).await;
            let listener = UnixListener::bind(&path).unwrap();
            let (mut first, _) = listener.accept().await.unwrap();
            first.write_all(b"1").await.unwrap();
            drop(first);
            let (mut second, _) = listener.accept().await.unwrap();
            second.write_all(b"2").await.unwrap();
        });
        for expected in ["1", "2"] {
            let mut control = dialled.next().await.unwrap().unwrap();
            let mut got = String::new();
            control.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, expected);
        }
        host.await.unwrap();
    }
}
