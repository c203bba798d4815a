//! One connection of containerd: calls to the sandbox are answered here, all others are handed
//! to the pod's task socket byte for byte, streams among them.
//!
//! Each connection has one of its own to the task socket, so that the ids of streams are the
//! same on both sides.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tonic::Status;

use crate::frame::Frame;
use crate::log::Log;
use crate::rpc::printed::ConnectTaskReply;
use crate::rpc::ttrpc::Request;
use crate::sandbox::Sandbox;

const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
const TASK: &str = "containerd.task.";

/// Serves one connection until its end.
pub(crate) async fn serve(connection: UnixStream, sandbox: Arc<Sandbox>, log: Arc<Log>) {
    let (mut from, to) = connection.into_split();
    let mut proxy = Proxy {
        sandbox,
        log: Arc::clone(&log),
        to: Arc::new(tokio::sync::Mutex::new(to)),
        upstream: None,
        // Ended with the connection: nobody would hear the answers.
        work: JoinSet::new(),
    };
    loop {
        match Frame::read(&mut from).await {
            Ok(Some(frame)) => proxy.take(frame).await,
            Ok(None) => break,
            Err(e) => {
                log.warn(&format!("containerd's connection broke: {e}"));
                break;
            }
        }
        while proxy.work.try_join_next().is_some() {}
    }
}

type Writer = Arc<tokio::sync::Mutex<OwnedWriteHalf>>;

struct Proxy {
    sandbox: Arc<Sandbox>,
    log: Arc<Log>,
    to: Writer,
    upstream: Option<Upstream>,
    work: JoinSet<()>,
}

/// The connection to the task socket.
struct Upstream {
    to: OwnedWriteHalf,
    open: Arc<Open>,
}

/// Streams that the task socket has not answered; `None` when the connection has ended.
#[derive(Debug)]
struct Open(Mutex<Option<HashSet<u32>>>);

impl Open {
    fn streams(&self) -> MutexGuard<'_, Option<HashSet<u32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a stream; `false` when the connection has ended.
    fn insert(&self, stream: u32) -> bool {
        let mut streams = self.streams();
        streams.as_mut().map(|open| open.insert(stream)).is_some()
    }

    fn remove(&self, stream: u32) -> bool {
        let mut streams = self.streams();
        streams.as_mut().is_some_and(|open| open.remove(&stream))
    }
}

impl Proxy {
    async fn take(&mut self, frame: Frame) {
        if !frame.is_request() {
            // More of a stream that the task socket serves.
            if let Some(upstream) = &mut self.upstream {
                let _ = frame.write(&mut upstream.to).await;
            }
            return;
        }
        let stream = frame.stream();
        match frame.request() {
            Ok(request) if request.service == SANDBOX => self.answer(stream, request),
            Ok(request) => self.forward(frame, request).await,
            Err(status) => send(&self.to, &Frame::response(stream, Err(status))).await,
        }
    }

    /// Answers a call to the sandbox, beside all others.
    fn answer(&mut self, stream: u32, request: Request) {
        let (sandbox, to) = (Arc::clone(&self.sandbox), Arc::clone(&self.to));
        self.work.spawn(async move {
            let call = sandbox.call(&request.method, &request.payload);
            let answer = match u64::try_from(request.timeout_nano) {
                Ok(limit) if limit > 0 => {
                    let limit = std::time::Duration::from_nanos(limit);
                    tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
                        let method = &request.method;
                        let message = format!("{method} took longer than {limit:?}");
                        Err(Status::deadline_exceeded(message))
                    })
                }
                _ => call.await,
            };
            let ends = request.method == "ShutdownSandbox" && answer.is_ok();
            send(&to, &Frame::response(stream, answer)).await;
            if ends {
                sandbox.end();
            }
        });
    }

    async fn forward(&mut self, frame: Frame, request: Request) {
        let stream = frame.stream();
        if request.service.starts_with(TASK) {
            let prepared = match request.method.as_str() {
                "Create" => self.sandbox.ensure(&request.payload).await,
                "Shutdown" => match self.sandbox.task_shutdown().await {
                    Ok(true) => {
                        send(&self.to, &Frame::response(stream, Ok(Vec::new()))).await;
                        return self.sandbox.end();
                    }
                    Ok(false) => Ok(()),
                    Err(status) => Err(status),
                },
                // containerd connects before it creates.
                "Connect" if self.sandbox.awaits_container().await => {
                    let answer = ConnectTaskReply {
                        shim_pid: std::process::id(),
                        ..Default::default()
                    };
                    let answer = Frame::response(stream, Ok(answer.encode_to_vec()));
                    return send(&self.to, &answer).await;
                }
                _ => Ok(()),
            };
            if let Err(status) = prepared {
                return send(&self.to, &Frame::response(stream, Err(status))).await;
            }
        }
        if let Err(status) = self.hand_on(&frame).await {
            let (service, method) = (&request.service, &request.method);
            self.log
                .warn(&format!("{service}/{method}: {}", status.message()));
            send(&self.to, &Frame::response(stream, Err(status))).await;
        }
    }

    async fn hand_on(&mut self, frame: &Frame) -> Result<(), Status> {
        let stream = frame.stream();
        if !self
            .upstream
            .as_ref()
            .is_some_and(|upstream| upstream.open.insert(stream))
        {
            let upstream = self.connect().await?;
            upstream.open.insert(stream);
            self.upstream = Some(upstream);
        }
        if let Some(upstream) = &mut self.upstream {
            // Should it break, the end of the connection answers for all its streams.
            let _ = frame.write(&mut upstream.to).await;
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<Upstream, Status> {
        let socket = self.sandbox.task_socket().await?;
        let connection = UnixStream::connect(&socket).await.map_err(|e| {
            self.sandbox.lost();
            let socket = socket.display();
            Status::unavailable(format!(
                "the sandbox's tasks are not served on {socket}: {e}"
            ))
        })?;
        let (from, to) = connection.into_split();
        let open = Arc::new(Open(Mutex::new(Some(HashSet::new()))));
        let back = back(
            from,
            Arc::clone(&self.to),
            Arc::clone(&open),
            Arc::clone(&self.sandbox),
        );
        self.work.spawn(back);
        Ok(Upstream { to, open })
    }
}

/// Carries what the task socket says back, until it says no more.
async fn back(mut from: OwnedReadHalf, to: Writer, open: Arc<Open>, sandbox: Arc<Sandbox>) {
    while let Ok(Some(frame)) = Frame::read(&mut from).await {
        if frame.is_response() {
            open.remove(frame.stream());
        }
        send(&to, &frame).await;
    }
    sandbox.lost();
    let lost = open.streams().take().unwrap_or_default();
    for stream in lost {
        let status = Status::unavailable("the sandbox has ended: its tasks are served no more");
        send(&to, &Frame::response(stream, Err(status))).await;
    }
}

async fn send(to: &Writer, frame: &Frame) {
    // Without a reader there is nobody to tell; the reading side sees the same end.
    let _ = frame.write(&mut *to.lock().await).await;
}
