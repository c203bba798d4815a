//! The fake guest: an agent whose programs are a few lines each.
//!
//! `echo TEXT` writes TEXT and a newline, `cat` copies stdin to stdout, `exit N` ends with
//! N, `sleep` waits for a signal, `missing` is not there and `denied` may not be run.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::stream::{StreamId, StreamKind};
use agent_api::{PROTOCOL_VERSION, rpc};
use async_trait::async_trait;
use futures::stream;
use protobuf::MessageField;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::{Notify, watch};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::{Code, get_status};
use vmm_core::vm::ExitReason;

use super::Fault;

/// A process that was created.
#[derive(Debug)]
struct Process {
    args: Vec<String>,
    stdio: rpc::Stdio,
    pid: u32,
    streams: Mutex<HashMap<StreamKind, BufReader<DuplexStream>>>,
    arrived: Notify,
    signal: watch::Sender<u32>,
    stdin_closed: watch::Sender<bool>,
}

type Key = (String, String);

#[derive(Debug)]
pub(crate) struct FakeAgent {
    fault: Fault,
    exit: watch::Sender<Option<ExitReason>>,
    next_pid: AtomicU32,
    processes: Mutex<HashMap<Key, Arc<Process>>>,
    exits: watch::Sender<Vec<(Key, u32)>>,
    off: watch::Sender<bool>,
    pub(crate) setup: Mutex<Option<rpc::SetupSandboxRequest>>,
    pub(crate) specs: Mutex<HashMap<String, Value>>,
}

fn refuse<T>(code: Code, message: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, message)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn args_of(process: &Value) -> Vec<String> {
    let args = process["args"].as_array().cloned().unwrap_or_default();
    args.iter()
        .filter_map(|arg| arg.as_str().map(str::to_owned))
        .collect()
}

impl FakeAgent {
    pub(super) fn new(fault: Fault, exit: watch::Sender<Option<ExitReason>>) -> Self {
        Self {
            fault,
            exit,
            next_pid: AtomicU32::new(100),
            processes: Mutex::default(),
            exits: watch::Sender::default(),
            off: watch::Sender::new(false),
            setup: Mutex::default(),
            specs: Mutex::default(),
        }
    }

    /// Serves the control connection until the machine is off.
    pub(super) async fn serve(self: Arc<Self>, stream: DuplexStream) {
        let mut off = self.off.subscribe();
        let mut server = Server::new()
            .add_listener(Listener::new(stream::iter([Ok(stream)])))
            .register_service(rpc::create_agent(self as _));
        server.start().await.expect("a listener was added");
        tokio::spawn(async move {
            let _ = off.wait_for(|off| *off).await;
            server.disconnect().await;
        });
    }

    pub(super) fn power_off(&self) {
        self.off.send_replace(true);
        for process in lock(&self.processes).values() {
            process.signal.send_replace(9);
        }
    }

    pub(super) fn accept_stream(self: Arc<Self>, stream: DuplexStream) {
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("a header");
            let id: StreamId = line.trim_end().parse().expect("a valid header");
            let process = self.process(&id.container_id, &id.exec_id).expect("exists");
            lock(&process.streams).insert(id.kind, stream);
            process.arrived.notify_one();
        });
    }

    fn process(&self, container: &str, exec: &str) -> Option<Arc<Process>> {
        let key = (container.to_owned(), exec.to_owned());
        lock(&self.processes).get(&key).cloned()
    }

    fn find(&self, process: &rpc::ProcessRef) -> ttrpc::Result<Arc<Process>> {
        match self.process(&process.container_id, &process.exec_id) {
            Some(process) => Ok(process),
            None => refuse(Code::NOT_FOUND, "no such process"),
        }
    }

    fn add(&self, key: Key, process: &Value, stdio: rpc::Stdio) -> u32 {
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let process = Process {
            args: args_of(process),
            stdio,
            pid,
            streams: Mutex::default(),
            arrived: Notify::new(),
            signal: watch::Sender::new(0),
            stdin_closed: watch::Sender::new(false),
        };
        lock(&self.processes).insert(key, Arc::new(process));
        pid
    }

    async fn killed(process: &Process) -> u32 {
        let mut signal = process.signal.subscribe();
        let signal = *signal.wait_for(|signal| *signal != 0).await.expect("alive");
        128 + signal
    }

    async fn program(process: &Process) -> u32 {
        let mut stdout = match process.stdio.stdout {
            true => Some(Self::stream(process, StreamKind::Stdout).await),
            false => None,
        };
        let args: Vec<&str> = process.args.iter().map(String::as_str).collect();
        match args.as_slice() {
            ["echo", text] => {
                if let Some(stdout) = &mut stdout {
                    let line = format!("{text}\n");
                    stdout.write_all(line.as_bytes()).await.expect("stdout");
                }
                0
            }
            ["cat"] => {
                let mut stdin = Self::stream(process, StreamKind::Stdin).await;
                let mut all = Vec::new();
                stdin.read_to_end(&mut all).await.expect("stdin");
                let mut closed = process.stdin_closed.subscribe();
                closed.wait_for(|closed| *closed).await.expect("alive");
                if let Some(stdout) = &mut stdout {
                    stdout.write_all(&all).await.expect("stdout");
                }
                0
            }
            ["exit", code] => code.parse().expect("a number"),
            _ => std::future::pending().await,
        }
    }

    async fn stream(process: &Process, kind: StreamKind) -> BufReader<DuplexStream> {
        loop {
            if let Some(stream) = lock(&process.streams).remove(&kind) {
                return stream;
            }
            process.arrived.notified().await;
        }
    }
}

#[async_trait]
impl rpc::Agent for FakeAgent {
    async fn events(
        &self,
        _: &TtrpcContext,
        _: rpc::EventsRequest,
        sender: ServerStreamSender<rpc::Event>,
    ) -> ttrpc::Result<()> {
        let version = match self.fault {
            Fault::OldAgent => PROTOCOL_VERSION + 1,
            _ => PROTOCOL_VERSION,
        };
        let mut ready = rpc::Event::new();
        ready.set_ready(rpc::Ready {
            protocol_version: version,
            kernel_release: "6.1.0-fake".to_owned(),
            ..Default::default()
        });
        sender.send(&ready).await?;
        let mut exits = self.exits.subscribe();
        let mut off = self.off.subscribe();
        let mut sent = 0;
        loop {
            let new: Vec<_> = exits.borrow_and_update()[sent..].to_vec();
            for ((container_id, exec_id), code) in new {
                sent += 1;
                let mut event = rpc::Event::new();
                event.set_exit(rpc::Exit {
                    process: MessageField::some(rpc::ProcessRef {
                        container_id,
                        exec_id,
                        ..Default::default()
                    }),
                    status: MessageField::some(rpc::ExitStatus {
                        code,
                        ..Default::default()
                    }),
                    ..Default::default()
                });
                sender.send(&event).await?;
            }
            tokio::select! {
                _ = exits.changed() => {}
                _ = off.wait_for(|off| *off) => return Ok(()),
            }
        }
    }

    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        request: rpc::SetupSandboxRequest,
    ) -> ttrpc::Result<rpc::Empty> {
        if self.fault == Fault::Setup {
            return refuse(Code::INTERNAL, "no setup today");
        }
        *lock(&self.setup) = Some(request);
        Ok(rpc::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: rpc::CreateContainerRequest,
    ) -> ttrpc::Result<rpc::ProcessReply> {
        if self.fault == Fault::Create {
            return refuse(Code::INTERNAL, "no containers today");
        }
        let spec: Value = serde_json::from_slice(&request.spec_json).expect("a spec");
        let key = (request.container_id.clone(), String::new());
        let pid = self.add(key, &spec["process"], request.stdio.unwrap_or_default());
        lock(&self.specs).insert(request.container_id, spec);
        Ok(rpc::ProcessReply {
            pid,
            ..Default::default()
        })
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: rpc::CreateExecRequest,
    ) -> ttrpc::Result<rpc::Empty> {
        let process: Value = serde_json::from_slice(&request.process_json).expect("a process");
        let key = (request.container_id, request.exec_id);
        self.add(key, &process, request.stdio.unwrap_or_default());
        Ok(rpc::Empty::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: rpc::ProcessRef,
    ) -> ttrpc::Result<rpc::ProcessReply> {
        let process = self.find(&request)?;
        match process.args.first().map(String::as_str) {
            Some("missing") => {
                return refuse(Code::NOT_FOUND, "missing: no such file or directory");
            }
            Some("denied") => return refuse(Code::PERMISSION_DENIED, "denied: permission denied"),
            _ => {}
        }
        let key = (request.container_id, request.exec_id);
        let pid = process.pid;
        let exits = FakeExits(self.exits.clone());
        tokio::spawn(async move { exits.follow(key, &process).await });
        Ok(rpc::ProcessReply {
            pid,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: rpc::SignalProcessRequest,
    ) -> ttrpc::Result<rpc::Empty> {
        let process = self.find(&request.process.unwrap_or_default())?;
        process.signal.send_replace(request.signal);
        Ok(rpc::Empty::new())
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: rpc::ProcessRef,
    ) -> ttrpc::Result<rpc::Empty> {
        self.find(&request)?.stdin_closed.send_replace(true);
        Ok(rpc::Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: rpc::ResizePtyRequest,
    ) -> ttrpc::Result<rpc::Empty> {
        self.find(&request.process.unwrap_or_default())?;
        Ok(rpc::Empty::new())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: rpc::ProcessRef,
    ) -> ttrpc::Result<rpc::ExitStatus> {
        self.find(&request)?;
        lock(&self.processes).remove(&(request.container_id, request.exec_id));
        Ok(rpc::ExitStatus::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        _: rpc::ContainerRef,
    ) -> ttrpc::Result<rpc::ListPidsResponse> {
        Ok(rpc::ListPidsResponse::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: rpc::ContainerRef,
    ) -> ttrpc::Result<rpc::StatsResponse> {
        Ok(rpc::StatsResponse {
            pids_current: 3,
            memory_usage_bytes: 4096,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        _: rpc::ContainerRef,
    ) -> ttrpc::Result<rpc::Empty> {
        Ok(rpc::Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        _: rpc::ContainerRef,
    ) -> ttrpc::Result<rpc::Empty> {
        Ok(rpc::Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        _: rpc::UpdateContainerRequest,
    ) -> ttrpc::Result<rpc::Empty> {
        Ok(rpc::Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: rpc::Empty) -> ttrpc::Result<rpc::Empty> {
        if self.fault != Fault::DeafGuest {
            self.exit.send_replace(Some(ExitReason::GuestReset));
        }
        Ok(rpc::Empty::new())
    }
}

/// Reports how a process ended.
struct FakeExits(watch::Sender<Vec<(Key, u32)>>);

impl FakeExits {
    async fn follow(&self, key: Key, process: &Process) {
        let code = tokio::select! {
            code = FakeAgent::program(process) => code,
            code = FakeAgent::killed(process) => code,
        };
        lock(&process.streams).clear();
        self.0.send_modify(|exits| exits.push((key, code)));
    }
}
