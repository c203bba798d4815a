//! The REST API: JSON over HTTP/1.1 on a Unix socket. One connection per request, so that
//! fds belong to one request for certain.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::NAME;
use crate::hypervisor::HvError;
use crate::rights;

/// Most bytes of an answer: the description of a large VM is far shorter.
const MAX_ANSWER: usize = 1 << 20;

/// The API of one VMM.
#[derive(Clone, Debug)]
pub(super) struct Api {
    socket: PathBuf,
    limit: Duration,
}

impl Api {
    pub(super) fn new(socket: &Path, limit: Duration) -> Self {
        Self {
            socket: socket.to_owned(),
            limit,
        }
    }

    /// Asks for something.
    pub(super) async fn get(&self, what: &'static str) -> Result<Value, HvError> {
        self.request(Method::GET, what, None, Vec::new()).await
    }

    /// Does something that needs no words.
    pub(super) async fn act(&self, what: &'static str) -> Result<Value, HvError> {
        self.request(Method::PUT, what, None, Vec::new()).await
    }

    /// Does something.
    pub(super) async fn put(&self, what: &'static str, body: Value) -> Result<Value, HvError> {
        self.request(Method::PUT, what, Some(body), Vec::new())
            .await
    }

    /// Does something that fds go with.
    pub(super) async fn put_with(
        &self,
        what: &'static str,
        body: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Value, HvError> {
        self.request(Method::PUT, what, Some(body), fds).await
    }

    async fn request(
        &self,
        method: Method,
        what: &'static str,
        body: Option<Value>,
        fds: Vec<OwnedFd>,
    ) -> Result<Value, HvError> {
        let exchange = timeout(self.limit, self.exchange(method, what, body, fds)).await;
        let (status, answer) = exchange
            .map_err(|_| HvError::Silent {
                vmm: NAME,
                what,
                limit: self.limit,
            })?
            .map_err(|err| HvError::Protocol {
                vmm: NAME,
                why: format!("{what}: {err}"),
            })?;
        if !status.is_success() {
            let why = String::from_utf8_lossy(&answer);
            return Err(HvError::Refused {
                vmm: NAME,
                request: what.to_owned(),
                why: format!("{status}: {}", why.trim()),
            });
        }
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer).map_err(|err| HvError::Protocol {
            vmm: NAME,
            why: format!("{what}: {err}"),
        })
    }

    async fn exchange(
        &self,
        method: Method,
        what: &str,
        body: Option<Value>,
        fds: Vec<OwnedFd>,
    ) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let io = TokioIo::new(WithFds { stream, fds });
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
        let connection = tokio::spawn(connection);
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{what}"))
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let answered = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER);
            Ok((status, body.collect().await?.to_bytes()))
        };
        let answered = answered.await;
        connection.abort();
        answered
    }
}

/// A socket whose first bytes take fds along.
struct WithFds {
    stream: UnixStream,
    fds: Vec<OwnedFd>,
}

impl AsyncRead for WithFds {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WithFds {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let me = &mut *self;
        if me.fds.is_empty() {
            return Pin::new(&mut me.stream).poll_write(cx, bytes);
        }
        loop {
            match me.stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(err)) => return Poll::Ready(Err(err)),
                Poll::Pending => return Poll::Pending,
            }
            let fds: Vec<BorrowedFd<'_>> = me.fds.iter().map(AsFd::as_fd).collect();
            match rights::try_send(&me.stream, bytes, &fds) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    if sent.is_ok() {
                        me.fds.clear();
                    }
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
