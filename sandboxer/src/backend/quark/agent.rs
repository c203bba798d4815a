//! Runs the containers of a pod by the Task API of its sandbox.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::rpc;
use agent_api::stream::StreamKind;
use async_trait::async_trait;
use containerd_shim_protos::api;
use external_hv::quark::NAME;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;
use vmm_core::vm::{GuestStream, Vm, VmError};

use super::fifo::{self, End, Fifos};
use super::lock;
use super::machine::QuarkPod;
use super::spec;
use crate::agent::{Agent, AgentError, AgentEvent, Connected, Limits, ProcessId};
use crate::pod::storage::ROOTFS;
use crate::pod::{ErrorCode, PodError};

type Result<T> = std::result::Result<T, AgentError>;

/// Events that nobody has taken yet.
const EVENT_BACKLOG: usize = 64;

/// Exit code of a process whose own is not known.
const UNKNOWN: u32 = 255;

const SERVICE: &str = "containerd.task.v2.Task";
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// See the module.
pub(super) struct QuarkAgent {
    pod: Arc<QuarkPod>,
    tasks: Tasks,
    limit: Duration,
    hostname: Mutex<String>,
    events: mpsc::Sender<AgentEvent>,
    processes: Mutex<HashMap<ProcessId, Held>>,
}

/// The Task API as Quark serves it: of version 2, which has the messages of later ones.
#[derive(Clone)]
struct Tasks {
    client: Client,
}

impl Tasks {
    /// A `limit` of zero is none.
    async fn request<A: Message>(
        &self,
        method: &'static str,
        request: &impl Message,
        limit: Duration,
    ) -> ttrpc::Result<A> {
        let (context, mut answer) = (with_duration(limit), A::new());
        ttrpc::async_client_request!(self, context, request, SERVICE, method, answer);
    }

    async fn call<A: Message>(
        &self,
        call: &'static str,
        method: &'static str,
        request: &impl Message,
        limit: Duration,
    ) -> Result<A> {
        // Sending may take as long as the answer.
        let answer = timeout(limit, self.request(method, request, limit)).await;
        answer
            .map_err(|_| AgentError::Deadline { call, limit })?
            .map_err(|e| AgentError::from_ttrpc(call, limit, e))
    }
}

/// What is held for a process.
#[derive(Debug)]
struct Held {
    fifos: Fifos,
    _wait: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for QuarkAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuarkAgent")
            .field("pod", &self.pod)
            .field("processes", &self.processes)
            .finish_non_exhaustive()
    }
}

impl QuarkAgent {
    /// Connects to a sandbox that runs, and waits for the containers that are in it already.
    pub(super) async fn connect(pod: Arc<QuarkPod>, limits: Limits) -> Result<Connected> {
        const CALL: &str = "connect to Quark";
        let dial = timeout(limits.connect, UnixStream::connect(pod.task_socket()));
        let stream = dial.await.map_err(|_| AgentError::Deadline {
            call: CALL,
            limit: limits.connect,
        })?;
        let stream = stream.map_err(|e| AgentError::Disconnected {
            call: CALL,
            reason: e.to_string(),
        })?;
        let (events, received) = mpsc::channel(EVENT_BACKLOG);
        let agent = Self {
            tasks: Tasks {
                client: Client::new(Socket::new(stream)),
            },
            limit: limits.call,
            hostname: Mutex::default(),
            events,
            processes: Mutex::default(),
            pod,
        };
        agent.answers(limits.boot).await?;
        let root = Arc::clone(&agent.pod.root);
        for container_id in blocking(CALL, move || Ok(root.containers())).await? {
            let id = process_id(&container_id, "");
            agent.hold(id, Fifos::default());
        }
        let ready = rpc::Ready {
            protocol_version: agent_api::PROTOCOL_VERSION,
            kernel_release: NAME.to_owned(),
            cpus: agent.pod.request.vcpus,
            memory_bytes: agent.pod.request.memory_bytes,
            ..Default::default()
        };
        Ok(Connected {
            client: Arc::new(agent),
            ready,
            events: received,
        })
    }

    /// Asks for a container that there cannot be: whatever it says, it serves.
    async fn answers(&self, limit: Duration) -> Result<()> {
        const CALL: &str = "start Quark's kernel";
        let request = api::StateRequest {
            id: self.pod.request.pod.clone(),
            ..Default::default()
        };
        let state = self
            .tasks
            .call::<api::StateResponse>(CALL, "State", &request, limit);
        match state.await {
            Ok(_) | Err(AgentError::Refused { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn call<A: Message>(
        &self,
        call: &'static str,
        method: &'static str,
        request: &impl Message,
    ) -> Result<A> {
        self.tasks.call(call, method, request, self.limit).await
    }

    /// Keeps what a process needs until it is deleted, and waits for its end.
    fn hold(&self, id: ProcessId, fifos: Fifos) {
        let (tasks, events) = (self.tasks.clone(), self.events.clone());
        let process = id.clone();
        let wait = tokio::spawn(async move {
            let request = api::WaitRequest {
                id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
                ..Default::default()
            };
            let wait = tasks.request::<api::WaitResponse>("Wait", &request, Duration::ZERO);
            let code = match wait.await {
                Ok(exit) => exit.exit_status,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    warn!(
                        container = process.container_id,
                        "no exit code: {}",
                        status.message()
                    );
                    UNKNOWN
                }
                // The sandbox has ended, and its end is told.
                Err(_) => return,
            };
            let exit = AgentEvent::Exit { process, code };
            // Nobody listens once the pod is being torn down.
            let _ = events.send(exit).await;
        });
        let held = Held {
            fifos,
            _wait: AbortOnDropHandle::new(wait),
        };
        lock(&self.processes).insert(id, held);
    }

    /// Makes the fifos of a process.
    async fn fifos(
        &self,
        call: &'static str,
        id: &ProcessId,
        wanted: &rpc::Stdio,
    ) -> Result<Fifos> {
        let folder = self.folder(call, &id.container_id).await?;
        Fifos::make(&folder, &id.exec_id, wanted).map_err(|e| {
            fifo::remove(&folder, &id.exec_id);
            refused(call, ErrorCode::Internal, format!("making its fifos: {e}"))
        })
    }

    async fn folder(&self, call: &'static str, container_id: &str) -> Result<OwnedFd> {
        let (root, id) = (Arc::clone(&self.pod.root), container_id.to_owned());
        let open = move || {
            let folder = root.folder(&id);
            folder.map_err(PodError::io(format!("opening the folder of {id}")))
        };
        blocking(call, open).await
    }
}

/// Where the sandbox has a fifo of a process; empty: it has none.
fn path(id: &ProcessId, kind: StreamKind, wanted: bool) -> String {
    if !wanted {
        return String::new();
    }
    format!("/{}/{}", id.container_id, fifo::name(&id.exec_id, kind))
}

fn process_id(container_id: &str, exec_id: &str) -> ProcessId {
    ProcessId {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
    }
}

fn json(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    })
}

fn refused(call: &'static str, code: ErrorCode, message: impl Into<String>) -> AgentError {
    AgentError::Refused {
        call,
        code,
        message: message.into(),
    }
}

/// Does what blocks.
async fn blocking<T: Send + 'static>(
    call: &'static str,
    work: impl FnOnce() -> std::result::Result<T, PodError> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| refused(call, ErrorCode::Internal, e.to_string()))?
        .map_err(|e| refused(call, e.code(), e.to_string()))
}

#[async_trait]
impl Agent for QuarkAgent {
    async fn setup_sandbox(&self, request: rpc::SetupSandboxRequest) -> Result<()> {
        *lock(&self.hostname) = request.hostname;
        Ok(())
    }

    async fn create_container(&self, request: rpc::CreateContainerRequest) -> Result<u32> {
        const CALL: &str = "create the container";
        let id = process_id(&request.container_id, "");
        let wanted = request.stdio.unwrap_or_default();
        let mut spec: Value = serde_json::from_slice(&request.spec_json)
            .map_err(|e| refused(CALL, ErrorCode::InvalidArgument, e.to_string()))?;
        let (root, share) = (Arc::clone(&self.pod.root), self.pod.request.share.clone());
        let (hostname, container) = (lock(&self.hostname).clone(), id.container_id.clone());
        let add = move || {
            let binds = spec::rewrite(&mut spec, &hostname, &share, root.shm())?;
            let rootfs = share.join(&container).join(ROOTFS);
            root.add(&container, &spec, &rootfs, &binds)
        };
        blocking(CALL, add).await?;
        let made = async {
            let fifos = self.fifos(CALL, &id, &wanted).await?;
            let request = api::CreateTaskRequest {
                id: id.container_id.clone(),
                bundle: format!("/{}", id.container_id),
                terminal: wanted.terminal,
                stdin: path(&id, StreamKind::Stdin, wanted.stdin),
                stdout: path(&id, StreamKind::Stdout, wanted.stdout),
                stderr: path(&id, StreamKind::Stderr, wanted.stderr),
                ..Default::default()
            };
            let created = self.call::<api::CreateTaskResponse>(CALL, "Create", &request);
            let pid = created.await?.pid;
            self.hold(id.clone(), fifos);
            Ok(pid)
        };
        let made = made.await;
        if made.is_err() {
            self.remove(&id).await;
        }
        made
    }

    async fn create_exec(&self, request: rpc::CreateExecRequest) -> Result<()> {
        const CALL: &str = "create the process";
        let id = process_id(&request.container_id, &request.exec_id);
        let wanted = request.stdio.unwrap_or_default();
        let fifos = self.fifos(CALL, &id, &wanted).await?;
        let request = api::ExecProcessRequest {
            id: request.container_id,
            exec_id: request.exec_id,
            terminal: wanted.terminal,
            stdin: path(&id, StreamKind::Stdin, wanted.stdin),
            stdout: path(&id, StreamKind::Stdout, wanted.stdout),
            stderr: path(&id, StreamKind::Stderr, wanted.stderr),
            spec: json(PROCESS_TYPE, request.process_json),
            ..Default::default()
        };
        let created = self.call::<api::Empty>(CALL, "Exec", &request);
        match created.await {
            Ok(_) => self.hold(id, fifos),
            Err(e) => {
                self.remove(&id).await;
                return Err(e);
            }
        }
        Ok(())
    }

    async fn start_process(&self, id: &ProcessId) -> Result<u32> {
        let request = api::StartRequest {
            id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        let started = self.call::<api::StartResponse>("start the process", "Start", &request);
        let pid = started.await?.pid;
        if let Some(held) = lock(&self.processes).get_mut(id) {
            held.fifos.started();
        }
        Ok(pid)
    }

    async fn signal(&self, id: &ProcessId, signal: u32, all: bool) -> Result<()> {
        let request = api::KillRequest {
            id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        let sent = self.call::<api::Empty>("signal the process", "Kill", &request);
        sent.await.map(drop)
    }

    async fn resize_pty(&self, id: &ProcessId, width: u32, height: u32) -> Result<()> {
        let request = api::ResizePtyRequest {
            id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            width,
            height,
            ..Default::default()
        };
        let resized = self.call::<api::Empty>("resize the terminal", "ResizePty", &request);
        resized.await.map(drop)
    }

    async fn close_stdin(&self, id: &ProcessId) -> Result<()> {
        let request = api::CloseIORequest {
            id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            stdin: true,
            ..Default::default()
        };
        let closed = self.call::<api::Empty>("close stdin", "CloseIO", &request);
        closed.await.map(drop)
    }

    async fn delete_process(&self, id: &ProcessId) -> Result<()> {
        let request = api::DeleteRequest {
            id: id.container_id.clone(),
            exec_id: id.exec_id.clone(),
            ..Default::default()
        };
        let deleted = self.call::<api::DeleteResponse>("delete the process", "Delete", &request);
        let deleted = deleted.await.map(drop);
        self.remove(id).await;
        deleted
    }

    async fn list_pids(&self, container_id: &str) -> Result<Vec<u32>> {
        let request = api::PidsRequest {
            id: container_id.to_owned(),
            ..Default::default()
        };
        let pids = self.call::<api::PidsResponse>("list processes", "Pids", &request);
        let pids = pids.await?.processes;
        Ok(pids.into_iter().map(|process| process.pid).collect())
    }

    async fn stats(&self, _container_id: &str) -> Result<rpc::StatsResponse> {
        Err(refused(
            "read statistics",
            ErrorCode::Unimplemented,
            "Quark has none of single containers; the pod's cgroup has those of its sandbox",
        ))
    }

    async fn pause_container(&self, container_id: &str) -> Result<()> {
        let request = api::PauseRequest {
            id: container_id.to_owned(),
            ..Default::default()
        };
        let paused = self.call::<api::Empty>("pause the container", "Pause", &request);
        paused.await.map(drop)
    }

    async fn resume_container(&self, container_id: &str) -> Result<()> {
        let request = api::ResumeRequest {
            id: container_id.to_owned(),
            ..Default::default()
        };
        let resumed = self.call::<api::Empty>("resume the container", "Resume", &request);
        resumed.await.map(drop)
    }

    async fn update_container(&self, container_id: &str, resources: Vec<u8>) -> Result<()> {
        let request = api::UpdateTaskRequest {
            id: container_id.to_owned(),
            resources: json(RESOURCES_TYPE, resources),
            ..Default::default()
        };
        let updated = self.call::<api::Empty>("update the container", "Update", &request);
        updated.await.map(drop)
    }

    async fn shutdown(&self) -> Result<()> {
        // It leaves nothing unwritten: the files are the host's.
        self.pod.kill();
        Ok(())
    }

    async fn open_stream(
        &self,
        _vm: &dyn Vm,
        id: &ProcessId,
        kind: StreamKind,
    ) -> std::result::Result<Box<dyn GuestStream>, VmError> {
        let held = lock(&self.processes)
            .get_mut(id)
            .and_then(|held| held.fifos.take(kind));
        if let Some(end) = held {
            return Ok(end.into_stream());
        }
        // Of a process that an earlier daemon made.
        let folder = self.folder("open a stream", &id.container_id).await;
        let folder = folder.map_err(|e| VmError::Backend(Box::new(e)))?;
        let end = End::open(&folder, &id.exec_id, kind);
        let end = end.map_err(|source| VmError::Io {
            what: format!("opening {} of {}", kind.as_str(), id.container_id),
            source,
        })?;
        Ok(end.into_stream())
    }
}

impl QuarkAgent {
    /// Forgets a process and removes what was made for it; with the init process, its container.
    async fn remove(&self, id: &ProcessId) {
        let held = lock(&self.processes).remove(id);
        drop(held);
        let (root, id) = (Arc::clone(&self.pod.root), id.clone());
        let remove = move || {
            if id.exec_id.is_empty() {
                root.remove(&id.container_id);
            } else if let Ok(folder) = root.folder(&id.container_id) {
                fifo::remove(&folder, &id.exec_id);
            }
        };
        let _ = tokio::task::spawn_blocking(remove).await;
    }
}
