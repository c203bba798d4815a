//! The two APIs of a daemon, as containerd uses them: Controller over gRPC, Task over ttrpc.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client as Ttrpc, TaskClient};
use prost::Message;
use tokio::net::UnixStream;
use tonic::transport::Channel;
use ttrpc::context::{Context, with_timeout};

use super::error::{CliError, Doing, Result};
use crate::rpc::controller;
use crate::rpc::controller::controller_client::ControllerClient;
use crate::rpc::cri::PodSandboxConfig;
use crate::rpc::pods;
use crate::rpc::pods::pods_client::PodsClient;
use crate::rpc::{POD_SANDBOX_CONFIG_TYPE, channel, types};

/// The daemon has shorter deadlines of its own; this one is for a daemon that hangs.
const CALL_LIMIT: Duration = Duration::from_secs(600);
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// State of a pod that can run containers.
pub(super) const READY: &str = "SANDBOX_READY";

/// A daemon's Controller.
#[derive(Clone, Debug)]
pub(super) struct Controller {
    client: ControllerClient<Channel>,
    pods: PodsClient<Channel>,
    address: PathBuf,
}

impl Controller {
    /// Connects; `None` when nothing listens at `address`.
    pub(super) async fn connect(address: &Path) -> Result<Option<Self>> {
        match UnixStream::connect(address).await {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(e) => {
                let failed =
                    CliError::caused(format!("cannot connect to {}", address.display()), &e);
                return Err(match e.kind() {
                    ErrorKind::PermissionDenied => failed.next("run as root, as the daemon does"),
                    _ => failed,
                });
            }
        }
        let channel = channel(address)
            .await
            .doing(|| format!("connect to {}", address.display()))?;
        Ok(Some(Self {
            pods: PodsClient::new(channel.clone()),
            client: ControllerClient::new(channel),
            address: address.to_owned(),
        }))
    }

    pub(super) fn address(&self) -> &Path {
        &self.address
    }

    pub(super) async fn create(
        &self,
        id: &str,
        netns: Option<&Path>,
        config: &PodSandboxConfig,
    ) -> Result<()> {
        let netns = netns.unwrap_or_else(|| Path::new(""));
        let request = controller::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            netns_path: netns.to_string_lossy().into_owned(),
            options: Some(prost_types::Any {
                type_url: POD_SANDBOX_CONFIG_TYPE.to_owned(),
                value: config.encode_to_vec(),
            }),
            sandbox: Some(types::Sandbox {
                sandbox_id: id.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.client.clone().create(limited_call(request)).await?;
        Ok(())
    }

    /// Starts a pod and connects to its Task API.
    pub(super) async fn start(&self, id: &str) -> Result<Task> {
        let request = controller::ControllerStartRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let started = self
            .client
            .clone()
            .start(limited_call(request))
            .await?
            .into_inner();
        Task::connect(&started.address).await
    }

    /// `None` when there is no such pod.
    pub(super) async fn status(
        &self,
        id: &str,
    ) -> Result<Option<controller::ControllerStatusResponse>> {
        let request = controller::ControllerStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            ..Default::default()
        };
        match self.client.clone().status(limited_call(request)).await {
            Ok(status) => Ok(Some(status.into_inner())),
            Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Waits until a pod has ended, however long that takes.
    pub(super) async fn wait(&self, id: &str) -> Result<()> {
        let request = controller::ControllerWaitRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        gone_is_fine(self.client.clone().wait(request).await)
    }

    /// Ends a pod; one that is gone counts as ended.
    pub(super) async fn stop(&self, id: &str) -> Result<()> {
        let request = controller::ControllerStopRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        gone_is_fine(self.client.clone().stop(limited_call(request)).await)
    }

    /// Forgets a pod and frees everything it had; one that is gone is free.
    pub(super) async fn shutdown(&self, id: &str) -> Result<()> {
        let request = controller::ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        gone_is_fine(self.client.clone().shutdown(limited_call(request)).await)
    }
}

/// What the daemon can do beyond containerd's API.
impl Controller {
    pub(super) async fn pause(&self, id: &str) -> Result<()> {
        let request = pods::PodRef { id: id.to_owned() };
        self.pods.clone().pause(limited_call(request)).await?;
        Ok(())
    }

    pub(super) async fn resume(&self, id: &str) -> Result<()> {
        let request = pods::PodRef { id: id.to_owned() };
        self.pods.clone().resume(limited_call(request)).await?;
        Ok(())
    }

    /// Writes a pod to an empty folder.
    pub(super) async fn snapshot(
        &self,
        id: &str,
        dir: &Path,
        base: Option<&Path>,
        keep_running: bool,
    ) -> Result<()> {
        let request = pods::SnapshotRequest {
            id: id.to_owned(),
            dir: dir.display().to_string(),
            keep_running,
            base: base.map_or_else(String::new, |base| base.display().to_string()),
        };
        self.pods.clone().snapshot(limited_call(request)).await?;
        Ok(())
    }

    /// Makes a pod of such a folder; returns its id.
    pub(super) async fn restore(&self, dir: &Path) -> Result<String> {
        let request = pods::RestoreRequest {
            dir: dir.display().to_string(),
        };
        let reply = self.pods.clone().restore(limited_call(request)).await?;
        Ok(reply.into_inner().id)
    }
}

/// A call that a daemon which hangs cannot hold for ever.
fn limited_call<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

fn gone_is_fine<T>(result: std::result::Result<T, tonic::Status>) -> Result<()> {
    match result {
        Err(status) if status.code() != tonic::Code::NotFound => Err(status.into()),
        _ => Ok(()),
    }
}

/// The Task API of one pod.
#[derive(Clone)]
pub(super) struct Task {
    client: TaskClient,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

/// Names a process: a container's first one, or an exec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ProcessName {
    pub(super) container: String,
    /// Empty for the container's first process.
    pub(super) exec: String,
}

/// Where a process's streams go, as the Task API names it.
#[derive(Clone, Debug, Default)]
pub(super) struct StdioNames {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

/// A mount for a container's root.
pub(super) fn rootfs_mount(fstype: &str, source: &str, options: Vec<String>) -> api::Mount {
    api::Mount {
        type_: fstype.to_owned(),
        source: source.to_owned(),
        options,
        ..Default::default()
    }
}

fn limited() -> Context {
    with_timeout(i64::try_from(CALL_LIMIT.as_nanos()).unwrap_or(i64::MAX))
}

impl Task {
    /// Connects to `ttrpc+unix:///path`.
    pub(super) async fn connect(address: &str) -> Result<Self> {
        let socket = address.strip_prefix("ttrpc+").unwrap_or(address);
        if !socket.starts_with("unix://") {
            return Err(CliError::new(format!(
                "the pod's task address {address:?} is not a unix socket"
            )));
        }
        let client = Ttrpc::connect(socket)
            .await
            .doing(|| format!("connect to {socket}"))?;
        Ok(Self {
            client: TaskClient::new(client),
        })
    }

    pub(super) async fn create(
        &self,
        id: &str,
        bundle: &Path,
        rootfs: Vec<api::Mount>,
        stdio: &StdioNames,
    ) -> Result<()> {
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            rootfs,
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            ..Default::default()
        };
        self.client.create(limited(), &request).await?;
        Ok(())
    }

    pub(super) async fn exec(
        &self,
        name: &ProcessName,
        process: &serde_json::Value,
        stdio: &StdioNames,
    ) -> Result<()> {
        let spec = Any {
            type_url: PROCESS_TYPE.to_owned(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.client.exec(limited(), &request).await?;
        Ok(())
    }

    /// The error keeps its ttrpc code: it tells why a program did not start.
    pub(super) async fn start(&self, name: &ProcessName) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            ..Default::default()
        };
        self.client.start(limited(), &request).await.map(drop)
    }

    /// Waits for the end of a process, however long that takes: its exit code.
    pub(super) async fn wait(&self, name: &ProcessName) -> Result<u32> {
        let request = api::WaitRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            ..Default::default()
        };
        let exit = self.client.wait(Context::default(), &request).await?;
        Ok(exit.exit_status)
    }

    pub(super) async fn state(&self, name: &ProcessName) -> Result<api::StateResponse> {
        let request = api::StateRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            ..Default::default()
        };
        Ok(self.client.state(limited(), &request).await?)
    }

    /// Sends a signal; a process that has ended is no error.
    pub(super) async fn kill(&self, name: &ProcessName, signal: i32, all: bool) -> Result<()> {
        let request = api::KillRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal: u32::try_from(signal).unwrap_or_default(),
            all,
            ..Default::default()
        };
        match self.client.kill(limited(), &request).await {
            Err(e) if !is_code(&e, ttrpc::Code::NOT_FOUND) => Err(e.into()),
            _ => Ok(()),
        }
    }

    pub(super) async fn resize(&self, name: &ProcessName, columns: u16, rows: u16) -> Result<()> {
        let request = api::ResizePtyRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.client.resize_pty(limited(), &request).await?;
        Ok(())
    }

    /// `resources` is OCI `LinuxResources`.
    pub(super) async fn update(
        &self,
        container: &str,
        resources: &serde_json::Value,
    ) -> Result<()> {
        let resources = Any {
            type_url: RESOURCES_TYPE.to_owned(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::UpdateTaskRequest {
            id: container.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client.update(limited(), &request).await?;
        Ok(())
    }

    pub(super) async fn close_stdin(&self, name: &ProcessName) -> Result<()> {
        let request = api::CloseIORequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            stdin: true,
            ..Default::default()
        };
        self.client.close_io(limited(), &request).await?;
        Ok(())
    }

    pub(super) async fn delete(&self, name: &ProcessName) -> Result<()> {
        let request = api::DeleteRequest {
            id: name.container.clone(),
            exec_id: name.exec.clone(),
            ..Default::default()
        };
        match self.client.delete(limited(), &request).await {
            Err(e) if !is_code(&e, ttrpc::Code::NOT_FOUND) => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// Whether the daemon answered with `code`.
pub(super) fn is_code(error: &ttrpc::Error, code: ttrpc::Code) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == code)
}
