//! The methods of the Task API.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use protobuf::MessageField;
use ttrpc::asynchronous::TtrpcContext;

use super::convert::{self, into_ttrpc};
use super::metrics::{Format, metrics};
use crate::pod::{CreateContainer, CreateExec, Pod, PodError, StdioPaths};

/// Metadata key with containerd's namespace.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// Serves the tasks of one pod.
#[derive(Debug)]
pub(super) struct TaskService {
    /// The pod owns its server, so the server must not own the pod.
    pod: Weak<Pod>,
    pod_id: String,
}

impl TaskService {
    pub(super) fn new(pod: &Arc<Pod>) -> Self {
        Self {
            pod: Arc::downgrade(pod),
            pod_id: pod.id().to_owned(),
        }
    }

    fn pod(&self) -> ttrpc::Result<Arc<Pod>> {
        self.pod
            .upgrade()
            .ok_or_else(|| into_ttrpc(PodError::not_found("sandbox", &self.pod_id)))
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.pod()?.container(request.id()).map_err(into_ttrpc)?;
        let process = container.process(request.exec_id()).map_err(into_ttrpc)?;
        Ok(convert::state(&container, &process))
    }

    async fn create(
        &self,
        context: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(into_ttrpc(PodError::Unsupported(
                "restoring a container from a checkpoint".to_owned(),
            )));
        }
        let create = CreateContainer {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs.into_iter().map(convert::mount).collect(),
            stdio: StdioPaths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            namespace: namespace(context),
        };
        let pid = self
            .pod()?
            .create_container(create)
            .await
            .map_err(into_ttrpc)?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self
            .pod()?
            .start_process(request.id(), request.exec_id())
            .await
            .map_err(into_ttrpc)?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = self
            .pod()?
            .delete(request.id(), request.exec_id())
            .await
            .map_err(into_ttrpc)?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.pod()?.pids(request.id()).await.map_err(into_ttrpc)?;
        let processes = pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid,
                ..Default::default()
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let paused = self.pod()?.pause(request.id()).await;
        paused.map(|()| Empty::new()).map_err(into_ttrpc)
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let resumed = self.pod()?.resume(request.id()).await;
        resumed.map(|()| Empty::new()).map_err(into_ttrpc)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(into_ttrpc(PodError::Unsupported(
            "checkpointing a container".to_owned(),
        )))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.pod()?
            .signal(request.id(), request.exec_id(), request.signal, request.all)
            .await
            .map(|()| Empty::new())
            .map_err(into_ttrpc)
    }

    async fn exec(
        &self,
        context: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let create = CreateExec {
            container_id: request.id,
            exec_id: request.exec_id,
            process_json: request.spec.into_option().unwrap_or_default().value,
            stdio: StdioPaths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            namespace: namespace(context),
        };
        self.pod()?
            .create_exec(create)
            .await
            .map(|()| Empty::new())
            .map_err(into_ttrpc)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.pod()?
            .resize_pty(
                request.id(),
                request.exec_id(),
                request.width,
                request.height,
            )
            .await
            .map(|()| Empty::new())
            .map_err(into_ttrpc)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.pod()?
                .close_stdin(request.id(), request.exec_id())
                .map_err(into_ttrpc)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.clone().into_option().unwrap_or_default();
        self.pod()?
            .update(request.id(), &resources.value)
            .await
            .map(|()| Empty::new())
            .map_err(into_ttrpc)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self
            .pod()?
            .container(request.id())
            .and_then(|container| container.process(request.exec_id()))
            .map_err(into_ttrpc)?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        context: &TtrpcContext,
        request: StatsRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod()?.stats(request.id()).await.map_err(into_ttrpc)?;
        // Only containerd's calls have a namespace.
        let format = match namespace(context).as_str() {
            "" => Format::V1,
            _ => Format::V2,
        };
        Ok(StatsResponse {
            stats: MessageField::some(metrics(&stats, format)?),
            ..Default::default()
        })
    }

    /// An id that is not there is no error: containerd 1.7 connects before it creates.
    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self
            .pod()?
            .container(request.id())
            .map_or(0, |container| container.init().pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    /// The server belongs to the pod and ends with it: iSulad sends this after each
    /// container.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }
}

fn namespace(context: &TtrpcContext) -> String {
    context
        .metadata
        .get(NAMESPACE_KEY)
        .and_then(|values| values.first())
        .cloned()
        .unwrap_or_default()
}
