//! Typed calls to the agent in a guest.
//!
//! The agent dials the host as soon as it can serve, so its first message is the "ready"
//! of the pod; nothing is polled. Should the stream break while the VM lives on, the agent
//! dials again and the calls continue on the new stream. Every call has a deadline.

mod contract;
mod error;
mod link;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc;
use agent_api::stream::{StreamId, StreamKind};
use async_trait::async_trait;
use protobuf::MessageField;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use ttrpc::context::{Context, with_duration};
use vmm_core::vm::{GuestListener, GuestStream, Vm, VmError};

use crate::config;

pub use contract::Agent;
pub use error::AgentError;

type Result<T> = std::result::Result<T, AgentError>;

/// Something that happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// A process ended.
    Exit {
        /// Which one.
        process: ProcessId,
        /// 0-255 as it returned it, or 128 + signal.
        code: u32,
    },
    /// The kernel killed a process of this container for want of memory.
    Oom {
        /// The container.
        container_id: String,
    },
}

/// Names a process of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container.
    pub container_id: String,
    /// Empty for the container's init process.
    pub exec_id: String,
}

impl ProcessId {
    fn to_rpc(&self) -> rpc::ProcessRef {
        rpc::ProcessRef {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        }
    }
}

/// Deadlines of a client.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From now to the agent's first message.
    pub boot: Duration,
    /// One call.
    pub call: Duration,
    /// Opening a byte stream.
    pub connect: Duration,
}

impl From<&config::Timeouts> for Limits {
    fn from(timeouts: &config::Timeouts) -> Self {
        Self {
            boot: timeouts.boot,
            call: timeouts.agent_call,
            connect: timeouts.connect,
        }
    }
}

/// What [`AgentClient::connect`] gives.
#[derive(Debug)]
pub struct Connected {
    /// For calls.
    pub client: Arc<dyn Agent>,
    /// What the agent said first.
    pub ready: rpc::Ready,
    /// What happens in the guest from now on; ends with the VM.
    pub events: mpsc::Receiver<AgentEvent>,
}

/// A connection to the agent of one pod.
pub struct AgentClient {
    current: watch::Receiver<Option<rpc::AgentClient>>,
    limits: Limits,
    _link: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentClient")
            .field("connected", &self.current.borrow().is_some())
            .field("limits", &self.limits)
            .finish()
    }
}

impl AgentClient {
    /// Waits for the agent to dial [`agent_api::CONTROL_PORT`] and to say it is ready.
    ///
    /// # Errors
    /// The boot deadline passed, the VM ended first, or the agent speaks another version.
    pub async fn connect(listener: Box<dyn GuestListener>, limits: Limits) -> Result<Connected> {
        let (current_tx, current) = watch::channel(None);
        let (events_tx, events) = mpsc::channel(link::EVENT_BACKLOG);
        let (link, ready) = link::Link::new(listener, current_tx, events_tx, limits.call);
        let link = AbortOnDropHandle::new(tokio::spawn(link.run()));
        let ready = match timeout(limits.boot, ready).await {
            Ok(Ok(ready)) => ready?,
            Ok(Err(_)) => {
                return Err(AgentError::Disconnected {
                    call: "boot",
                    reason: "the VM ended before the agent was ready".to_owned(),
                });
            }
            Err(_) => {
                return Err(AgentError::Deadline {
                    call: "boot",
                    limit: limits.boot,
                });
            }
        };
        let client = Self {
            current,
            limits,
            _link: link,
        };
        Ok(Connected {
            client: Arc::new(client),
            ready,
            events,
        })
    }

    async fn call<T, F, Fut>(&self, call: &'static str, f: F) -> Result<T>
    where
        F: FnOnce(rpc::AgentClient, Context) -> Fut,
        Fut: Future<Output = ttrpc::Result<T>>,
    {
        let limit = self.limits.call;
        let attempt = async {
            let mut current = self.current.clone();
            let client = match current.wait_for(Option::is_some).await {
                Ok(client) => (*client).clone(),
                Err(_) => None,
            };
            let client = client.ok_or_else(|| AgentError::Disconnected {
                call,
                reason: "the VM has ended".to_owned(),
            })?;
            f(client, with_duration(limit))
                .await
                .map_err(|e| AgentError::from_ttrpc(call, limit, e))
        };
        timeout(limit, attempt)
            .await
            .unwrap_or(Err(AgentError::Deadline { call, limit }))
    }
}

#[async_trait]
impl Agent for AgentClient {
    async fn setup_sandbox(&self, request: rpc::SetupSandboxRequest) -> Result<()> {
        self.call("set up the sandbox", |c, ctx| async move {
            c.setup_sandbox(ctx, &request).await
        })
        .await
        .map(drop)
    }

    async fn update_network(&self, network: rpc::Network) -> Result<()> {
        self.call("update the network", |c, ctx| async move {
            c.update_network(ctx, &network).await
        })
        .await
        .map(drop)
    }

    async fn attach_disk(&self, disk: rpc::Disk) -> Result<rpc::DiskReply> {
        self.call("find the disk", |c, ctx| async move {
            c.attach_disk(ctx, &disk).await
        })
        .await
    }

    async fn detach_disk(&self, disk: rpc::Disk) -> Result<()> {
        self.call("let go of the disk", |c, ctx| async move {
            c.detach_disk(ctx, &disk).await
        })
        .await
        .map(drop)
    }

    async fn set_cpus(&self, count: u32) -> Result<u32> {
        let request = rpc::CpuCount {
            count,
            ..Default::default()
        };
        self.call("set the number of CPUs", |c, ctx| async move {
            c.set_cpus(ctx, &request).await
        })
        .await
        .map(|reply| reply.count)
    }

    async fn create_container(&self, request: rpc::CreateContainerRequest) -> Result<u32> {
        self.call("create the container", |c, ctx| async move {
            c.create_container(ctx, &request).await
        })
        .await
        .map(|reply| reply.pid)
    }

    async fn create_exec(&self, request: rpc::CreateExecRequest) -> Result<()> {
        self.call("create the process", |c, ctx| async move {
            c.create_exec(ctx, &request).await
        })
        .await
        .map(drop)
    }

    async fn start_process(&self, process: &ProcessId) -> Result<u32> {
        let process = process.to_rpc();
        self.call("start the process", |c, ctx| async move {
            c.start_process(ctx, &process).await
        })
        .await
        .map(|reply| reply.pid)
    }

    async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<()> {
        let request = rpc::SignalProcessRequest {
            process: MessageField::some(process.to_rpc()),
            signal,
            all,
            ..Default::default()
        };
        self.call("signal the process", |c, ctx| async move {
            c.signal_process(ctx, &request).await
        })
        .await
        .map(drop)
    }

    async fn resize_pty(&self, process: &ProcessId, width: u32, height: u32) -> Result<()> {
        let request = rpc::ResizePtyRequest {
            process: MessageField::some(process.to_rpc()),
            width,
            height,
            ..Default::default()
        };
        self.call("resize the terminal", |c, ctx| async move {
            c.resize_pty(ctx, &request).await
        })
        .await
        .map(drop)
    }

    async fn close_stdin(&self, process: &ProcessId) -> Result<()> {
        let process = process.to_rpc();
        self.call("close stdin", |c, ctx| async move {
            c.close_stdin(ctx, &process).await
        })
        .await
        .map(drop)
    }

    async fn delete_process(&self, process: &ProcessId) -> Result<()> {
        let process = process.to_rpc();
        self.call("delete the process", |c, ctx| async move {
            c.delete_process(ctx, &process).await
        })
        .await
        .map(drop)
    }

    async fn list_pids(&self, container_id: &str) -> Result<Vec<u32>> {
        let container = container_ref(container_id);
        self.call("list pids", |c, ctx| async move {
            c.list_pids(ctx, &container).await
        })
        .await
        .map(|reply| reply.pids)
    }

    async fn stats(&self, container_id: &str) -> Result<rpc::StatsResponse> {
        let container = container_ref(container_id);
        self.call("read statistics", |c, ctx| async move {
            c.stats(ctx, &container).await
        })
        .await
    }

    async fn pause_container(&self, container_id: &str) -> Result<()> {
        let container = container_ref(container_id);
        self.call("pause the container", |c, ctx| async move {
            c.pause_container(ctx, &container).await
        })
        .await
        .map(drop)
    }

    async fn resume_container(&self, container_id: &str) -> Result<()> {
        let container = container_ref(container_id);
        self.call("resume the container", |c, ctx| async move {
            c.resume_container(ctx, &container).await
        })
        .await
        .map(drop)
    }

    async fn update_container(&self, container_id: &str, resources: Vec<u8>) -> Result<()> {
        let request = rpc::UpdateContainerRequest {
            container_id: container_id.to_owned(),
            resources_json: resources,
            ..Default::default()
        };
        self.call("update the container", |c, ctx| async move {
            c.update_container(ctx, &request).await
        })
        .await
        .map(drop)
    }

    async fn shutdown(&self) -> Result<()> {
        self.call("shut the guest down", |c, ctx| async move {
            c.shutdown(ctx, &rpc::Empty::new()).await
        })
        .await
        .map(drop)
    }

    async fn open_stream(
        &self,
        vm: &dyn Vm,
        process: &ProcessId,
        kind: StreamKind,
    ) -> std::result::Result<Box<dyn GuestStream>, VmError> {
        let limit = self.limits.connect;
        let open = async {
            let mut stream = vm.connect(agent_api::STREAM_PORT, limit).await?;
            let id = StreamId {
                container_id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
                kind,
            };
            stream
                .write_all(format!("{id}\n").as_bytes())
                .await
                .map_err(|source| VmError::Io {
                    what: format!("opening {} of {}", kind.as_str(), process.container_id),
                    source,
                })?;
            Ok(stream)
        };
        timeout(limit, open).await.unwrap_or(Err(VmError::Deadline {
            what: "opening a byte stream to the guest",
            limit,
        }))
    }
}

fn container_ref(container_id: &str) -> rpc::ContainerRef {
    rpc::ContainerRef {
        container_id: container_id.to_owned(),
        ..Default::default()
    }
}
