//! `containerd.runtime.sandbox.v1.Sandbox`, out of the daemon's Controller.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prost::Message;
use prost_types::Timestamp;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tonic::{Code, Status};

use crate::bundle::Spec;
use crate::daemon::Daemon;
use crate::log::Log;
use crate::rpc::controller as api;
use crate::rpc::printed::CreateTaskHead;
use crate::rpc::{POD_SANDBOX_CONFIG_TYPE, sandbox as wire};

/// Annotation of Create that tells the daemon where this containerd takes events.
const EVENTS_ANNOTATION: &str = "io.kuasar.containerd.ttrpc-address";

/// The scheme of the address of a pod's Task API.
const TASK_SCHEME: &str = "ttrpc+unix://";

/// State of a pod that does not run.
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Who asked for the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Nobody has.
    None,
    /// containerd made a sandbox of it, and will shut it down.
    Sandbox,
    /// A container that came without a sandbox; the pod goes when its containers have.
    Container,
}

/// The pod of this shim.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: String,
    daemon: Daemon,
    log: Arc<Log>,
    /// Where the daemon serves the pod's tasks, once it runs.
    task_socket: Mutex<Option<PathBuf>>,
    /// When the pod was made, once it runs.
    created_at: OnceLock<Option<Timestamp>>,
    origin: tokio::sync::Mutex<Origin>,
    /// Notified when nothing is left to serve.
    ended: Notify,
}

impl Sandbox {
    pub(crate) fn new(id: &str, daemon: Daemon, log: Arc<Log>) -> Self {
        Self {
            id: id.to_owned(),
            daemon,
            log,
            task_socket: Mutex::new(None),
            created_at: OnceLock::new(),
            origin: tokio::sync::Mutex::new(Origin::None),
            ended: Notify::new(),
        }
    }

    /// Waits until the pod was shut down.
    pub(crate) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Nothing is left to serve.
    pub(crate) fn end(&self) {
        self.log.info("the sandbox is shut down");
        self.ended.notify_one();
    }

    /// Answers one call.
    ///
    /// # Errors
    /// What the daemon answers, or that there is none.
    pub(crate) async fn call(&self, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status> {
        self.log.debug(&format!("{method} is asked"));
        let answer = self.dispatch(method, payload).await;
        answer.map_err(|status| {
            let status = self.daemon.explain(status);
            self.log.warn(&format!("{method}: {}", status.message()));
            status
        })
    }

    async fn dispatch(&self, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status> {
        match method {
            "CreateSandbox" => self.create(decode(payload)?).await,
            "StartSandbox" => self.start(id(payload)?).await,
            "Platform" => self.platform(id(payload)?).await,
            "StopSandbox" => self.stop(decode(payload)?).await,
            "WaitSandbox" => self.wait(id(payload)?).await,
            "SandboxStatus" => self.status(decode(payload)?).await,
            "PingSandbox" => self.ping(id(payload)?).await,
            "ShutdownSandbox" => self.shutdown(id(payload)?).await,
            "SandboxMetrics" => self.metrics(id(payload)?).await,
            other => Err(Status::unimplemented(format!("Sandbox has no {other}"))),
        }
    }

    async fn create(&self, request: wire::CreateSandboxRequest) -> Result<Vec<u8>, Status> {
        let created = self.create_pod(api::ControllerCreateRequest {
            sandbox_id: request.sandbox_id,
            rootfs: request.rootfs,
            options: request.options,
            netns_path: request.netns_path,
            annotations: request.annotations,
            ..Default::default()
        });
        // Until then calls about tasks wait to learn whose the pod is.
        let mut origin = self.origin.lock().await;
        created.await?;
        *origin = Origin::Sandbox;
        Ok(Vec::new())
    }

    async fn create_pod(&self, mut request: api::ControllerCreateRequest) -> Result<(), Status> {
        if let Ok(events) = std::env::var("TTRPC_ADDRESS") {
            let key = EVENTS_ANNOTATION.to_owned();
            request.annotations.entry(key).or_insert(events);
        }
        self.daemon.controller().create(request).await.map(drop)
    }

    async fn start(&self, id: String) -> Result<Vec<u8>, Status> {
        let started = self.start_pod(id).await?;
        let answer = wire::StartSandboxResponse {
            pid: started.pid,
            created_at: started.created_at,
        };
        Ok(answer.encode_to_vec())
    }

    async fn start_pod(&self, id: String) -> Result<api::ControllerStartResponse, Status> {
        let request = api::ControllerStartRequest {
            sandbox_id: id,
            ..Default::default()
        };
        let started = self.daemon.controller().start(request).await?.into_inner();
        self.log.info("the sandbox is started");
        let _ = self.created_at.set(started.created_at);
        self.remember(&started.address)?;
        Ok(started)
    }

    async fn platform(&self, id: String) -> Result<Vec<u8>, Status> {
        let request = api::ControllerPlatformRequest {
            sandbox_id: id,
            ..Default::default()
        };
        let answer = self.daemon.controller().platform(request).await?;
        let platform = answer.into_inner().platform;
        Ok(wire::PlatformResponse { platform }.encode_to_vec())
    }

    async fn stop(&self, request: wire::StopSandboxRequest) -> Result<Vec<u8>, Status> {
        let request = api::ControllerStopRequest {
            sandbox_id: request.sandbox_id,
            timeout_secs: request.timeout_secs,
            ..Default::default()
        };
        match self.daemon.controller().stop(request).await {
            Err(status) if status.code() != Code::NotFound => Err(status),
            _ => Ok(Vec::new()),
        }
    }

    async fn wait(&self, id: String) -> Result<Vec<u8>, Status> {
        let ended = self.daemon.wait(&id).await?;
        let answer = wire::WaitSandboxResponse {
            exit_status: ended.exit_status,
            exited_at: ended.exited_at,
        };
        Ok(answer.encode_to_vec())
    }

    async fn daemons_status(
        &self,
        id: String,
        verbose: bool,
    ) -> Result<api::ControllerStatusResponse, Status> {
        let request = api::ControllerStatusRequest {
            sandbox_id: id,
            verbose,
            ..Default::default()
        };
        let answer = self.daemon.controller().status(request).await?;
        Ok(answer.into_inner())
    }

    async fn status(&self, request: wire::SandboxStatusRequest) -> Result<Vec<u8>, Status> {
        let id = request.sandbox_id;
        let status = self.daemons_status(id.clone(), request.verbose).await;
        let status = match status {
            Err(status) if status.code() == Code::NotFound => self.gone(id),
            status => status?,
        };
        let answer = wire::SandboxStatusResponse {
            // containerd goes on with the id that it finds here.
            sandbox_id: status.sandbox_id,
            pid: status.pid,
            state: status.state,
            info: status.info,
            created_at: status.created_at,
            exited_at: status.exited_at,
            extra: status.extra,
        };
        Ok(answer.encode_to_vec())
    }

    /// What is left of a pod that went with its daemon. containerd still has it, and takes an
    /// error for a reason to ask again and again.
    fn gone(&self, sandbox_id: String) -> api::ControllerStatusResponse {
        api::ControllerStatusResponse {
            sandbox_id,
            state: NOT_READY.to_owned(),
            created_at: self.created_at.get().copied().flatten(),
            ..Default::default()
        }
    }

    async fn ping(&self, id: String) -> Result<Vec<u8>, Status> {
        self.daemons_status(id, false).await.map(|_| Vec::new())
    }

    async fn shutdown(&self, id: String) -> Result<Vec<u8>, Status> {
        match self.daemon.shutdown(&id).await {
            // There is nothing to end, so this process must not stay for it.
            Err(status)
                if status.code() == Code::Unavailable
                    && *self.origin.lock().await == Origin::None =>
            {
                self.log.warn(status.message());
                Ok(Vec::new())
            }
            other => other.map(|()| Vec::new()),
        }
    }

    async fn metrics(&self, id: String) -> Result<Vec<u8>, Status> {
        let request = api::ControllerMetricsRequest {
            sandbox_id: id,
            ..Default::default()
        };
        let answer = self.daemon.controller().metrics(request).await?;
        let metrics = answer.into_inner().metrics;
        Ok(wire::SandboxMetricsResponse { metrics }.encode_to_vec())
    }

    /// Where the pod's tasks are served.
    ///
    /// # Errors
    /// The pod does not run, or the daemon cannot be reached.
    pub(crate) async fn task_socket(&self) -> Result<PathBuf, Status> {
        let known = self.known();
        if let Some(socket) = known {
            return Ok(socket);
        }
        // A pod that this process did not start, or lost sight of with its daemon.
        let status = self.daemons_status(self.id.clone(), false).await;
        let status = status.map_err(|status| self.daemon.explain(status))?;
        if status.address.is_empty() {
            let id = &self.id;
            // containerd forgets tasks that are not found, and no others.
            return Err(Status::not_found(format!(
                "the sandbox {id} does not run: its state is {}",
                status.state
            )));
        }
        self.remember(&status.address)
    }

    /// A connection to the pod's tasks.
    ///
    /// # Errors
    /// As of [`Self::task_socket`], or nobody is there.
    pub(crate) async fn connect_tasks(&self) -> Result<UnixStream, Status> {
        let socket = self.task_socket().await?;
        UnixStream::connect(&socket).await.map_err(|e| {
            self.lost();
            let socket = socket.display();
            Status::unavailable(format!(
                "the sandbox's tasks are not served on {socket}: {e}"
            ))
        })
    }

    /// The same, where the daemon may have gone away: the next one is waited for, since only it
    /// can tell whether the pod went, too.
    ///
    /// # Errors
    /// The pod does not run any more.
    pub(crate) async fn tasks_again(&self) -> Result<UnixStream, Status> {
        self.daemon.back().await;
        self.connect_tasks().await
    }

    fn known(&self) -> Option<PathBuf> {
        let known = self.task_socket.lock();
        known.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remember(&self, address: &str) -> Result<PathBuf, Status> {
        let socket = address.strip_prefix(TASK_SCHEME).map(PathBuf::from);
        let socket = socket.ok_or_else(|| {
            Status::internal(format!(
                "the daemon serves tasks on {address:?}: this shim needs {TASK_SCHEME}"
            ))
        })?;
        let mut known = self
            .task_socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(known.insert(socket).clone())
    }

    /// Nobody is on the task socket any more.
    pub(crate) fn lost(&self) {
        *self
            .task_socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Makes a pod for a container that comes without one, as from `ctr` and `nerdctl`.
    ///
    /// # Errors
    /// What the daemon answers, or that there is none.
    pub(crate) async fn ensure(&self, create_task: &[u8]) -> Result<(), Status> {
        let mut origin = self.origin.lock().await;
        if *origin == Origin::Sandbox || self.task_socket().await.is_ok() {
            return Ok(());
        }
        let task: CreateTaskHead = decode(create_task)?;
        let spec = Spec::read(Path::new(&task.bundle));
        let created = self.create_pod(api::ControllerCreateRequest {
            sandbox_id: self.id.clone(),
            options: Some(prost_types::Any {
                type_url: POD_SANDBOX_CONFIG_TYPE.to_owned(),
                value: spec.pod().encode_to_vec(),
            }),
            netns_path: spec.netns(),
            annotations: HashMap::new(),
            ..Default::default()
        });
        let up = async {
            created.await?;
            self.start_pod(self.id.clone()).await
        };
        up.await.map_err(|status| self.daemon.explain(status))?;
        *origin = Origin::Container;
        Ok(())
    }

    /// containerd has no more use for a task of this shim. Returns whether that was all: a pod
    /// that was made for containers goes with the last of them.
    ///
    /// # Errors
    /// What the daemon answers, or that there is none.
    pub(crate) async fn task_shutdown(&self) -> Result<bool, Status> {
        if *self.origin.lock().await == Origin::Sandbox {
            return Ok(false);
        }
        let status = self.daemons_status(self.id.clone(), true).await;
        let used = status.is_ok_and(|status| {
            let info = status.info.get("info").map(String::as_str);
            let info: Option<Info> = info.and_then(|json| serde_json::from_str(json).ok());
            info.is_some_and(|info| !info.containers.is_empty())
        });
        if used {
            return Ok(false);
        }
        self.daemon.shutdown(&self.id).await?;
        Ok(true)
    }

    /// Whether a container may come that the pod is yet to be made for.
    pub(crate) async fn awaits_container(&self) -> bool {
        *self.origin.lock().await == Origin::None && self.known().is_none()
    }
}

/// What is needed of the daemon's verbose status.
#[derive(serde::Deserialize)]
struct Info {
    #[serde(default)]
    containers: Vec<String>,
}

fn decode<T: Message + Default>(payload: &[u8]) -> Result<T, Status> {
    T::decode(payload).map_err(|e| Status::invalid_argument(e.to_string()))
}

fn id(payload: &[u8]) -> Result<String, Status> {
    decode::<wire::SandboxRef>(payload).map(|reference| reference.sandbox_id)
}
