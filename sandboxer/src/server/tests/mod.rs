//! The daemon over its real sockets, with machines that are not real.

mod containers;
mod faults;
mod lifecycle;
mod streaming;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::MessageField;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tonic::transport::Channel;
use ttrpc::context::Context;

use super::{RunningServer, Server, ServerOptions};
use crate::config::{Config, Timeouts};
use crate::pod::storage::mount_points_below;
use crate::rpc::controller::controller_client::ControllerClient;
use crate::rpc::{channel, controller as rpc};
use crate::testing::{FakeBackend, Fault};

/// Longer than any test takes, shorter than a hanging one would.
const SOON: Duration = Duration::from_secs(20);

/// A daemon in a folder of its own.
struct Daemon {
    server: RunningServer,
    backend: Arc<FakeBackend>,
    root: tempfile::TempDir,
}

impl Daemon {
    async fn start(fault: Fault, timeouts: Timeouts) -> Self {
        let root = tempfile::tempdir().unwrap();
        let backend = FakeBackend::new(fault);
        let options = ServerOptions {
            pods_outlive: false,
            listen: root.path().join("s.sock"),
            dir: root.path().join("pods"),
            config: Config {
                timeouts,
                ..Default::default()
            },
            backend: Some(Arc::clone(&backend) as _),
        };
        let server = Server::start(options).await.unwrap();
        Self {
            server,
            backend,
            root,
        }
    }

    fn pods_dir(&self) -> PathBuf {
        self.root.path().join("pods")
    }

    async fn client(&self) -> ControllerClient<Channel> {
        let channel = channel(self.server.address()).await.unwrap();
        ControllerClient::new(channel)
    }

    async fn create(&self, id: &str) -> Result<(), tonic::Status> {
        let request = rpc::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        self.client().await.create(request).await.map(drop)
    }

    async fn start_pod(&self, id: &str) -> Result<rpc::ControllerStartResponse, tonic::Status> {
        let request = rpc::ControllerStartRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let response = self.client().await.start(request).await?;
        Ok(response.into_inner())
    }

    /// A pod that is ready, and a client of its tasks.
    async fn ready_pod(&self, id: &str) -> TaskClient {
        self.create(id).await.unwrap();
        let address = self.start_pod(id).await.unwrap().address;
        let socket = address.strip_prefix("ttrpc+").unwrap();
        TaskClient::new(ttrpc::asynchronous::Client::connect(socket).await.unwrap())
    }

    async fn stop(&self, id: &str) -> Result<(), tonic::Status> {
        let request = rpc::ControllerStopRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        self.client().await.stop(request).await.map(drop)
    }

    async fn shutdown_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = rpc::ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        self.client().await.shutdown(request).await.map(drop)
    }

    async fn wait(&self, id: &str) -> Result<u32, tonic::Status> {
        let request = rpc::ControllerWaitRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let response = self.client().await.wait(request).await?;
        Ok(response.into_inner().exit_status)
    }

    async fn status(&self, id: &str) -> Result<rpc::ControllerStatusResponse, tonic::Status> {
        let request = rpc::ControllerStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            ..Default::default()
        };
        Ok(self.client().await.status(request).await?.into_inner())
    }

    /// A bundle whose process is the fake program `args`.
    fn bundle(&self, name: &str, args: &[&str]) -> PathBuf {
        let bundle = self.root.path().join(name);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": args},
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// Asks for a container that runs `args`.
    fn container(&self, id: &str, args: &[&str]) -> api::CreateTaskRequest {
        api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: self
                .bundle(&format!("bundle-{id}"), args)
                .display()
                .to_string(),
            ..Default::default()
        }
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.root.path().join(name);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&path, mode).unwrap();
        path
    }

    /// Nothing is left in the daemon's folder, mounted or not.
    fn assert_clean(&self) {
        let left: Vec<_> = std::fs::read_dir(self.pods_dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "daemon.lock")
            .collect();
        assert_eq!(left, Vec::<std::ffi::OsString>::new());
        let mounted = mount_points_below(self.root.path()).unwrap();
        assert_eq!(mounted, Vec::<PathBuf>::new());
    }
}

/// Whether this process may mount, which every pod needs.
fn can_mount() -> bool {
    let allowed = nix::unistd::geteuid().is_root()
        && nix::sched::unshare(nix::sched::CloneFlags::empty()).is_ok();
    if !allowed {
        println!("skipped: only root can mount");
    }
    allowed
}

fn context() -> Context {
    ttrpc::context::with_duration(SOON)
}

fn process(id: &str, exec: &str) -> api::StateRequest {
    api::StateRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

async fn start_task(tasks: &TaskClient, id: &str, exec: &str) -> ttrpc::Result<u32> {
    let request = api::StartRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    };
    tasks.start(context(), &request).await.map(|r| r.pid)
}

async fn wait_task(tasks: &TaskClient, id: &str, exec: &str) -> u32 {
    let request = api::WaitRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    };
    tasks.wait(context(), &request).await.unwrap().exit_status
}

async fn state_of(tasks: &TaskClient, id: &str, exec: &str) -> api::Status {
    let state = tasks.state(context(), &process(id, exec)).await.unwrap();
    state.status.enum_value().unwrap()
}

async fn delete_task(tasks: &TaskClient, id: &str, exec: &str) -> ttrpc::Result<u32> {
    let request = api::DeleteRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    };
    tasks
        .delete(context(), &request)
        .await
        .map(|r| r.exit_status)
}

async fn kill_task(tasks: &TaskClient, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
    let request = api::KillRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        signal,
        ..Default::default()
    };
    tasks.kill(context(), &request).await.map(drop)
}

fn exec(id: &str, exec: &str, args: &[&str]) -> api::ExecProcessRequest {
    api::ExecProcessRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        spec: MessageField::some(protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: json!({"args": args}).to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn ttrpc_code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

fn reader(path: &Path) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

async fn read_all(mut reader: pipe::Receiver) -> String {
    let mut all = String::new();
    tokio::time::timeout(SOON, reader.read_to_string(&mut all))
        .await
        .expect("end of file")
        .unwrap();
    all
}
