//! iSulad's side of the sandbox and task services, message by message as its release 2.1.6
//! sends them: no metadata, empty `type_url`, no events, Task v2, and a connection for each
//! container.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use prost::Message as _;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use sandboxer::rpc::controller::controller_client::ControllerClient;
use sandboxer::rpc::controller::{
    ControllerCreateRequest, ControllerPlatformRequest, ControllerShutdownRequest,
    ControllerStartRequest, ControllerStartResponse, ControllerStatusRequest,
    ControllerStatusResponse, ControllerStopRequest, ControllerUpdateRequest,
    ControllerWaitRequest,
};
use sandboxer::rpc::{cri, types};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};
use ttrpc::context::Context;

/// The name that the configuration gives the sandboxer.
const SANDBOXER: &str = "vmm";

/// iSulad sets no deadline; a test that hangs is to end.
const LIMIT: Duration = Duration::from_secs(300);

/// The process-wide client.
pub(crate) struct Sandboxer {
    client: ControllerClient<Channel>,
}

impl Sandboxer {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let uri = format!("unix://{}", socket.display());
        let channel = Endpoint::from_shared(uri).unwrap().connect().await;
        Self {
            client: ControllerClient::new(channel.unwrap()),
        }
    }

    pub(crate) async fn create(&self, id: &str, netns: &Path, config: &cri::PodSandboxConfig) {
        let request = ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            options: Some(prost_types::Any {
                type_url: String::new(),
                value: config.encode_to_vec(),
            }),
            netns_path: netns.display().to_string(),
            sandboxer: SANDBOXER.to_owned(),
            ..Default::default()
        };
        self.client.clone().create(request).await.unwrap();
    }

    pub(crate) async fn start(&self, id: &str) -> ControllerStartResponse {
        let request = ControllerStartRequest {
            sandbox_id: id.to_owned(),
            sandboxer: SANDBOXER.to_owned(),
        };
        self.client
            .clone()
            .start(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Its own task, as in iSulad; the exit status.
    pub(crate) fn wait(&self, id: &str) -> tokio::task::JoinHandle<u32> {
        let request = ControllerWaitRequest {
            sandbox_id: id.to_owned(),
            sandboxer: SANDBOXER.to_owned(),
        };
        let mut client = self.client.clone();
        tokio::spawn(async move { client.wait(request).await.unwrap().into_inner().exit_status })
    }

    /// What an iSulad that was restarted asks first.
    pub(crate) async fn status(&self, id: &str) -> ControllerStatusResponse {
        let request = ControllerStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: false,
            sandboxer: SANDBOXER.to_owned(),
        };
        let status = self.client.clone().status(request).await;
        status.unwrap().into_inner()
    }

    pub(crate) async fn platform(&self, id: &str) -> types::Platform {
        let request = ControllerPlatformRequest {
            sandbox_id: id.to_owned(),
            sandboxer: SANDBOXER.to_owned(),
        };
        let platform = self.client.clone().platform(request).await;
        platform.unwrap().into_inner().platform.unwrap()
    }

    /// The whole list, before each change.
    pub(crate) async fn update_tasks(&self, id: &str, tasks: &[Value]) {
        let list = types::Sandbox {
            sandbox_id: id.to_owned(),
            extensions: HashMap::from([(
                "tasks".to_owned(),
                prost_types::Any {
                    type_url: "github.com/containerd/containerd/Tasks".to_owned(),
                    value: json!({ "tasks": tasks }).to_string().into_bytes(),
                },
            )]),
            ..Default::default()
        };
        let request = ControllerUpdateRequest {
            sandbox_id: id.to_owned(),
            sandboxer: SANDBOXER.to_owned(),
            sandbox: Some(list),
            fields: vec!["extensions.tasks".to_owned()],
        };
        self.client.clone().update(request).await.unwrap();
    }

    pub(crate) async fn stop(&self, id: &str) {
        let request = ControllerStopRequest {
            sandbox_id: id.to_owned(),
            timeout_secs: 10,
            sandboxer: SANDBOXER.to_owned(),
        };
        self.client.clone().stop(request).await.unwrap();
    }

    pub(crate) async fn shutdown(&self, id: &str) {
        let request = ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            sandboxer: SANDBOXER.to_owned(),
        };
        self.client.clone().shutdown(request).await.unwrap();
    }
}

/// The streams of a process: fifos that iSulad makes.
#[derive(Clone)]
pub(crate) struct Fifos {
    pub(crate) stdin: PathBuf,
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
}

impl Fifos {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let make = |stream: &str| {
            let path = dir.join(format!("{name}-{stream}"));
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path
        };
        Self {
            stdin: make("in"),
            stdout: make("out"),
            stderr: make("err"),
        }
    }

    /// Everything that is written to stdout until it ends.
    pub(crate) fn read_stdout(&self) -> std::thread::JoinHandle<String> {
        let path = self.stdout.clone();
        std::thread::spawn(move || std::fs::read_to_string(path).unwrap())
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// One container's connection.
pub(crate) struct Tasks {
    client: TaskClient,
}

impl Tasks {
    /// `address` as Start or Status gave it.
    pub(crate) async fn connect(address: &str) -> Self {
        let path = address
            .strip_prefix("ttrpc+unix://")
            .unwrap_or_else(|| panic!("iSulad cannot use {address}"));
        let client = Client::connect(&format!("unix://{path}")).await.unwrap();
        Self {
            client: TaskClient::new(client),
        }
    }

    /// Without root file system and options.
    pub(crate) async fn create(&self, id: &str, bundle: &Path, fifos: &Fifos) {
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: text(bundle),
            stdin: text(&fifos.stdin),
            stdout: text(&fifos.stdout),
            stderr: text(&fifos.stderr),
            ..Default::default()
        };
        self.client.create(context(), &request).await.unwrap();
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str, process: &Value, fifos: &Fifos) {
        let request = api::ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: text(&fifos.stdin),
            stdout: text(&fifos.stdout),
            stderr: text(&fifos.stderr),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.client.exec(context(), &request).await.unwrap();
    }

    pub(crate) async fn start(&self, id: &str, exec: &str) -> u32 {
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.client.start(context(), &request).await.unwrap().pid
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let exit = self.client.wait(context(), &request).await;
        exit.unwrap().exit_status
    }

    /// With signal 0, whether it lives.
    pub(crate) async fn kill(&self, id: &str, signal: u32) -> Result<(), ttrpc::Error> {
        let request = api::KillRequest {
            id: id.to_owned(),
            signal,
            ..Default::default()
        };
        self.client.kill(context(), &request).await.map(drop)
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let request = api::PidsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let pids = self.client.pids(context(), &request).await.unwrap();
        pids.processes.iter().map(|process| process.pid).collect()
    }

    /// Decoded as figures of cgroup v1, whatever they say they are.
    pub(crate) async fn stats(&self, id: &str) -> Metrics {
        let request = api::StatsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let stats = self.client.stats(context(), &request).await.unwrap();
        Metrics::parse_from_bytes(&stats.stats.value).unwrap()
    }

    pub(crate) async fn pause(&self, id: &str) {
        let request = api::PauseRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.pause(context(), &request).await.unwrap();
    }

    pub(crate) async fn resume(&self, id: &str) {
        let request = api::ResumeRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.resume(context(), &request).await.unwrap();
    }

    /// After the exit, each time both.
    pub(crate) async fn delete_and_shutdown(&self, id: &str) {
        let delete = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.delete(context(), &delete).await.unwrap();
        let shutdown = api::ShutdownRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.shutdown(context(), &shutdown).await.unwrap();
    }
}

fn context() -> Context {
    ttrpc::context::with_duration(LIMIT)
}
