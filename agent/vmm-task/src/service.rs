//! The RPC service: `proto/agent.proto` on top of [`Agent`].

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use agent_api::PROTOCOL_VERSION;
use agent_api::rpc::{
    Agent as AgentService, ContainerRef, CpuCount, CreateContainerRequest, CreateExecRequest, Disk,
    DiskReply, Empty, Event, EventsRequest, ExitStatus, ListPidsResponse, Network, ProcessRef,
    ProcessReply, ResizePtyRequest, SetupSandboxRequest, SignalProcessRequest, StatsResponse,
    UpdateContainerRequest,
};
use async_trait::async_trait;
use futures::FutureExt;
use tokio::sync::Notify;
use tracing::{error, info};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::agent::Agent;
use crate::cpus;
use crate::disks;
use crate::error::{AgentError, check_id};

/// The service of one agent.
#[derive(Debug)]
pub struct Service {
    agent: Arc<Agent>,
    shutdown: Arc<Notify>,
}

impl Service {
    /// Serves `agent`; `shutdown` is told when the host asks for it.
    pub const fn new(agent: Arc<Agent>, shutdown: Arc<Notify>) -> Self {
        Self { agent, shutdown }
    }
}

/// Runs one request. A panic in it is an error of that request only.
async fn answer<T>(
    request: &'static str,
    work: impl Future<Output = Result<T, AgentError>>,
) -> ttrpc::Result<T> {
    let result = AssertUnwindSafe(work).catch_unwind().await;
    let result =
        result.unwrap_or_else(|_| Err(AgentError::Internal(format!("{request} panicked"))));
    result.map_err(|e| {
        if matches!(
            e,
            AgentError::Io { .. } | AgentError::Runtime(_) | AgentError::Internal(_)
        ) {
            error!("{request}: {e}");
        }
        e.into()
    })
}

fn reply(pid: u32) -> ProcessReply {
    ProcessReply {
        pid,
        ..Default::default()
    }
}

#[async_trait]
impl AgentService for Service {
    async fn events(
        &self,
        _: &TtrpcContext,
        request: EventsRequest,
        host: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let theirs = request.protocol_version;
        if theirs != PROTOCOL_VERSION {
            return Err(AgentError::State {
                what: format!("protocol_version {theirs} (the agent has {PROTOCOL_VERSION})"),
                is: "another",
                needs: "the same: rebuild the guest image",
            }
            .into());
        }
        let mut events = self.agent.subscribe();
        while let Some(event) = events.recv().await {
            host.send(&event).await?;
        }
        Ok(())
    }

    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        request: SetupSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        answer("SetupSandbox", async {
            self.agent.setup_sandbox(&request)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn update_network(&self, _: &TtrpcContext, network: Network) -> ttrpc::Result<Empty> {
        answer("UpdateNetwork", async {
            self.agent.update_network(&network)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn attach_disk(&self, _: &TtrpcContext, disk: Disk) -> ttrpc::Result<DiskReply> {
        answer("AttachDisk", disks::attach(&disk)).await
    }

    async fn detach_disk(&self, _: &TtrpcContext, disk: Disk) -> ttrpc::Result<Empty> {
        answer("DetachDisk", async {
            disks::detach(&disk)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: CpuCount) -> ttrpc::Result<CpuCount> {
        answer("SetCpus", async {
            Ok(CpuCount {
                count: cpus::set_online(request.count).await?,
                ..Default::default()
            })
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessReply> {
        answer("CreateContainer", async {
            self.agent.create_container(&request).map(reply)
        })
        .await
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> ttrpc::Result<Empty> {
        answer("CreateExec", async {
            self.agent.create_exec(&request)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> ttrpc::Result<ProcessReply> {
        answer("StartProcess", async {
            self.agent.start(&request).await.map(reply)
        })
        .await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        answer("SignalProcess", async {
            self.agent.signal(&request)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        answer("ResizePty", async {
            let process = request.process.get_or_default();
            self.agent.resize(process, request.width, request.height)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRef) -> ttrpc::Result<Empty> {
        answer("CloseStdin", async {
            self.agent.close_stdin(&request)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> ttrpc::Result<ExitStatus> {
        answer("DeleteProcess", self.agent.delete(&request)).await
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<ListPidsResponse> {
        answer("ListPids", async {
            check_id("container_id", &request.container_id)?;
            Ok(ListPidsResponse {
                pids: self.agent.pids(&request.container_id)?,
                ..Default::default()
            })
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRef) -> ttrpc::Result<StatsResponse> {
        answer("Stats", async {
            check_id("container_id", &request.container_id)?;
            self.agent.stats(&request.container_id)
        })
        .await
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<Empty> {
        answer("PauseContainer", self.set_paused(&request, true)).await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<Empty> {
        answer("ResumeContainer", self.set_paused(&request, false)).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        answer("UpdateContainer", async {
            check_id("container_id", &request.container_id)?;
            self.agent
                .update(&request.container_id, &request.resources_json)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        info!("the host asks to shut down");
        self.shutdown.notify_one();
        Ok(Empty::default())
    }
}

impl Service {
    async fn set_paused(&self, request: &ContainerRef, paused: bool) -> Result<Empty, AgentError> {
        check_id("container_id", &request.container_id)?;
        self.agent.set_paused(&request.container_id, paused).await?;
        Ok(Empty::default())
    }
}
