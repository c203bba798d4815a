//! One connection of containerd: calls to the sandbox are answered here, all others are handed
//! to the pod's task socket byte for byte, streams among them.
//!
//! Each connection has one of its own to the task socket, so that the ids of streams are the
//! same on both sides. A daemon that goes away may leave the pod to the next one: calls that wait
//! for the end of a process are asked again there, all others fail.

use std::collections::HashMap;
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

/// Streams that are not answered, with their request where it may be asked again.
type Streams = HashMap<u32, Option<Frame>>;

/// What the task socket has not answered; `None` when the connection has ended.
#[derive(Debug)]
struct Open(Mutex<Option<Streams>>);

impl Open {
    fn streams(&self) -> MutexGuard<'_, Option<Streams>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a stream; `false` when the connection has ended.
    fn insert(&self, stream: u32, again: Option<&Frame>) -> bool {
        let mut streams = self.streams();
        let open = streams.as_mut();
        open.map(|open| open.insert(stream, again.cloned()))
            .is_some()
    }

    fn remove(&self, stream: u32) {
        if let Some(open) = self.streams().as_mut() {
            open.remove(&stream);
        }
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
        let task = request.service.starts_with(TASK);
        if task {
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
        let waits = task && request.method == "Wait";
        if let Err(status) = self.hand_on(&frame, waits).await {
            let (service, method) = (&request.service, &request.method);
            self.log
                .warn(&format!("{service}/{method}: {}", status.message()));
            send(&self.to, &Frame::response(stream, Err(status))).await;
        }
    }

    async fn hand_on(&mut self, frame: &Frame, waits: bool) -> Result<(), Status> {
        let note = |upstream: &Upstream| {
            let again = waits.then_some(frame);
            upstream.open.insert(frame.stream(), again)
        };
        if !self.upstream.as_ref().is_some_and(note) {
            let upstream = self.connect().await?;
            note(&upstream);
            self.upstream = Some(upstream);
        }
        if let Some(upstream) = &mut self.upstream {
            // Should it break, the end of the connection answers for all its streams.
            let _ = frame.write(&mut upstream.to).await;
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<Upstream, Status> {
        let (from, to) = self.sandbox.connect_tasks().await?.into_split();
        let open = Arc::new(Open(Mutex::new(Some(Streams::new()))));
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

/// Carries what the task socket says back, until all that was asked there is answered.
async fn back(mut from: OwnedReadHalf, to: Writer, open: Arc<Open>, sandbox: Arc<Sandbox>) {
    while let Ok(Some(frame)) = Frame::read(&mut from).await {
        if frame.is_response() {
            open.remove(frame.stream());
        }
        send(&to, &frame).await;
    }
    sandbox.lost();
    let mut waits = HashMap::new();
    let lost = open.streams().take().unwrap_or_default();
    for (stream, again) in lost {
        if let Some(frame) = again {
            waits.insert(stream, frame);
            continue;
        }
        let status = Status::unavailable("the sandbox's tasks are served no more");
        send(&to, &Frame::response(stream, Err(status))).await;
    }
    while !waits.is_empty() {
        match sandbox.tasks_again().await {
            Ok(connection) => wait_again(connection, &to, &mut waits).await,
            Err(status) => {
                for (stream, _) in waits.drain() {
                    send(&to, &Frame::response(stream, Err(status.clone()))).await;
                }
            }
        }
        sandbox.lost();
    }
}

/// Asks what waits again, and carries the answers back.
async fn wait_again(mut connection: UnixStream, to: &Writer, waits: &mut HashMap<u32, Frame>) {
    for frame in waits.values() {
        if frame.write(&mut connection).await.is_err() {
            return;
        }
    }
    while !waits.is_empty()
        && let Ok(Some(frame)) = Frame::read(&mut connection).await
    {
        if waits.remove(&frame.stream()).is_some() {
            send(to, &frame).await;
        }
    }
}

async fn send(to: &Writer, frame: &Frame) {
    // Without a reader there is nobody to tell; the reading side sees the same end.
    let _ = frame.write(&mut *to.lock().await).await;
}
