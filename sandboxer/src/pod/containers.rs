//! Containers and processes of a pod: the operations of the Task API.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::rpc;
use agent_api::stream::StreamKind;
use protobuf::MessageField;
use serde_json::Value;
use tokio::time::timeout;
use tracing::{info, warn};
use vmm_core::vm::GuestStream;

use super::container::Container;
use super::disks::plan::{self, WantedDisk};
use super::oci::{self, Guest};
use super::process::{Exit, Process, ProcessState};
use super::request::check_id;
use super::stdio::{GuestStdio, HostStdio, LogOwner, Stdio, StdioPaths};
use super::storage::{ContainerStorage, Recipe, RootfsMount};
use super::{Machine, Phase, Pod, PodError, Result, lock, phase};
use crate::events::TaskEventKind;

/// A container as it is to be.
#[derive(Clone, Debug, Default)]
pub struct CreateContainer {
    /// Names the container.
    pub id: String,
    /// Folder with `config.json`.
    pub bundle: PathBuf,
    /// What makes up the root file system; empty: what `root.path` of the spec names.
    pub rootfs: Vec<RootfsMount>,
    /// Where the streams of its first process go.
    pub stdio: StdioPaths,
    /// containerd's namespace; empty if the caller named none.
    pub namespace: String,
}

/// A process to add to a container.
#[derive(Clone, Debug, Default)]
pub struct CreateExec {
    /// The container.
    pub container_id: String,
    /// Names the process.
    pub exec_id: String,
    /// OCI `Process` as JSON.
    pub process_json: Vec<u8>,
    /// Where its streams go.
    pub stdio: StdioPaths,
    /// containerd's namespace; empty if the caller named none.
    pub namespace: String,
}

/// What a container is made of.
struct Files {
    spec: Value,
    storage: ContainerStorage,
    disks: Vec<WantedDisk>,
    overlay: Option<rpc::Mount>,
}

impl Pod {
    /// Creates a container with its init process, not started; returns the guest's pid.
    ///
    /// # Errors
    /// The id is taken, the pod is not ready, the bundle or a mount cannot be used, or the
    /// guest refuses. Nothing is left then.
    pub async fn create_container(self: &Arc<Self>, request: CreateContainer) -> Result<u32> {
        check_id("id", &request.id)?;
        let machine = self.machine()?;
        let container = self.reserve_container(&request)?;
        let pod = Arc::clone(self);
        // Finished or undone as a whole, even if the caller goes away.
        let work = async move {
            let made = pod.make_container(&machine, &container, &request).await;
            match &made {
                Ok(pid) => {
                    info!(pod = pod.id(), container = request.id, "created");
                    pod.describe_for_next_daemon().await;
                    let (bundle, pid) = (request.bundle, *pid);
                    pod.tell(&container, TaskEventKind::Create { bundle, pid });
                }
                Err(e) => {
                    warn!(pod = pod.id(), container = request.id, "create failed: {e}");
                    pod.forget_container(&container).await;
                }
            }
            made
        };
        self.finish("creating the container", work).await
    }

    async fn finish<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.operations
            .spawn(work)
            .await
            .unwrap_or(Err(PodError::Cancelled(what)))
    }

    fn reserve_container(&self, request: &CreateContainer) -> Result<Arc<Container>> {
        let mut containers = lock(&self.containers);
        // Under the lock: a pod that ends takes its containers from the map afterwards.
        if self.phase() != Phase::Ready {
            return Err(self.wrong_phase("create a container in"));
        }
        if containers.contains_key(&request.id) {
            return Err(PodError::Exists {
                what: "container",
                id: request.id.clone(),
            });
        }
        let container = Container::new(
            &request.id,
            &request.bundle,
            &request.namespace,
            request.stdio.clone(),
        );
        let container = Arc::new(container);
        containers.insert(request.id.clone(), Arc::clone(&container));
        Ok(container)
    }

    async fn forget_container(&self, container: &Container) {
        lock(&self.containers).remove(container.id());
        let disks = container.take_disks();
        if let Ok(machine) = self.machine() {
            self.detach_disks(&machine, disks).await;
        }
        let storage = container.take_storage();
        let _ = tokio::task::spawn_blocking(move || drop(storage)).await;
    }

    async fn make_container(
        &self,
        machine: &Arc<Machine>,
        container: &Container,
        request: &CreateContainer,
    ) -> Result<u32> {
        let mut files = self.prepare_files(request).await?;
        container.set_storage(files.storage);
        let mut plugged = Vec::new();
        let attached = self.attach_disks(machine, &files.disks, &mut plugged).await;
        container.set_disks(plugged);
        let mut disks = attached?;
        oci::set_numbers(&mut files.spec, &disks.devices);
        disks.mounts.extend(files.overlay);
        let host = HostStdio::open(
            &request.stdio,
            &owner(&request.namespace, &request.id),
            &self.streams,
        )
        .await?;
        let spec_json = to_json(&files.spec)?;
        let pid = machine
            .agent
            .create_container(rpc::CreateContainerRequest {
                container_id: request.id.clone(),
                spec_json,
                stdio: MessageField::some(request.stdio.to_rpc()),
                mounts: disks.mounts,
                ..Default::default()
            })
            .await?;
        match self.wire_stdio(machine, container.init(), host).await {
            Ok(stdio) => {
                container.init().created(pid, stdio);
                Ok(pid)
            }
            Err(e) => {
                // The guest must not keep what the host gives up.
                let _ = machine.agent.delete_process(container.init().id()).await;
                Err(e)
            }
        }
    }

    /// The spec for the guest, and everything it names mounted under the share, but for disks.
    async fn prepare_files(&self, request: &CreateContainer) -> Result<Files> {
        let announced = self.announced_task(&request.id);
        let share = lock(&self.share)
            .as_ref()
            .map(|share| share.path().to_owned())
            .ok_or_else(|| self.wrong_phase("create a container in"))?;
        let request = request.clone();
        let files = self.files.clone();
        let pod_pid = self.pid();
        let pids: Vec<u32> = lock(&self.containers)
            .values()
            .map(|container| container.init().pid())
            .filter(|&pid| pid != 0)
            .collect();
        let privileged = self.request.is_privileged();
        let work = move || {
            let mut spec = match announced.as_ref().and_then(|task| task.spec.clone()) {
                Some(spec) => spec,
                None => read_spec(&request.bundle)?,
            };
            let mut rootfs = request.rootfs;
            if rootfs.is_empty() {
                rootfs = announced.map(|task| task.rootfs()).unwrap_or_default();
            }
            if rootfs.is_empty() {
                rootfs.push(rootfs_of_bundle(&request.bundle, &spec));
            }
            set_terminal(spec.get_mut("process"), request.stdio.terminal);
            let guest = Guest {
                container: &request.id,
                files: &files,
                pod_pid,
                pids: &pids,
                privileged,
            };
            let needs = oci::rewrite(&mut spec, &guest)?;
            let root = plan::root(&request.id, rootfs)?;
            if let Some(path) = &root.path {
                oci::move_root(&mut spec, path);
            }
            let recipe = Recipe {
                rootfs: root.host,
                binds: needs.binds,
            };
            let storage = ContainerStorage::prepare(&share, &request.id, recipe)?;
            Ok(Files {
                spec,
                storage,
                disks: root.disks.into_iter().chain(needs.disks).collect(),
                overlay: root.overlay,
            })
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or(Err(PodError::Cancelled("preparing the files")))
    }

    /// Opens the guest's streams of a created process and connects them to the host's.
    pub(super) async fn wire_stdio(
        &self,
        machine: &Arc<Machine>,
        process: &Process,
        host: HostStdio,
    ) -> Result<Stdio> {
        let wanted = process.stdio_paths().to_rpc();
        let open = |kind, wanted| self.open_stream(machine, process, kind, wanted);
        let (stdin, stdout, stderr) = tokio::try_join!(
            open(StreamKind::Stdin, wanted.stdin),
            open(StreamKind::Stdout, wanted.stdout),
            open(StreamKind::Stderr, wanted.stderr),
        )?;
        let guest = GuestStdio {
            stdin,
            stdout,
            stderr,
        };
        let agent = Arc::downgrade(machine);
        let id = process.id().clone();
        let stdin_ended = async move {
            if let Some(machine) = agent.upgrade() {
                // A process that is gone has no stdin to close.
                let _ = machine.agent.close_stdin(&id).await;
            }
        };
        Ok(host.connect(guest, self.environment.timeouts.drain, stdin_ended))
    }

    async fn open_stream(
        &self,
        machine: &Machine,
        process: &Process,
        kind: StreamKind,
        wanted: bool,
    ) -> Result<Option<Box<dyn GuestStream>>> {
        if !wanted {
            return Ok(None);
        }
        machine
            .agent
            .open_stream(machine.vm.as_ref(), process.id(), kind)
            .await
            .map(Some)
            .map_err(|e| self.vm_error(e))
    }

    /// Adds a process to a container, not started.
    ///
    /// # Errors
    /// The exec id is taken, the container does not run, or the guest refuses.
    pub async fn create_exec(self: &Arc<Self>, request: CreateExec) -> Result<()> {
        check_id("exec_id", &request.exec_id)?;
        let container = self.container(&request.container_id)?;
        if container.init().state() != ProcessState::Running {
            return Err(container.init().wrong_state("exec in"));
        }
        let machine = self.machine()?;
        let process = container.add_exec(&request.exec_id, request.stdio.clone())?;
        let pod = Arc::clone(self);
        let work = async move {
            let made = pod.make_exec(&machine, &process, &request).await;
            let exec_id = request.exec_id;
            match &made {
                Ok(()) => pod.tell(&container, TaskEventKind::ExecAdded { exec_id }),
                Err(_) => container.remove_exec(&exec_id),
            }
            made
        };
        self.finish("creating the process", work).await
    }

    async fn make_exec(
        &self,
        machine: &Arc<Machine>,
        process: &Process,
        request: &CreateExec,
    ) -> Result<()> {
        let mut spec: Value = serde_json::from_slice(&request.process_json)
            .map_err(|e| PodError::invalid("spec", e.to_string(), "must be an OCI process"))?;
        oci::clean_process(&mut spec, &request.container_id)?;
        set_terminal(Some(&mut spec), request.stdio.terminal);
        let owner = owner(&request.namespace, &request.container_id);
        let host = HostStdio::open(&request.stdio, &owner, &self.streams).await?;
        machine
            .agent
            .create_exec(rpc::CreateExecRequest {
                container_id: request.container_id.clone(),
                exec_id: request.exec_id.clone(),
                process_json: to_json(&spec)?,
                stdio: MessageField::some(request.stdio.to_rpc()),
                ..Default::default()
            })
            .await?;
        match self.wire_stdio(machine, process, host).await {
            Ok(stdio) => {
                process.created(0, stdio);
                Ok(())
            }
            Err(e) => {
                let _ = machine.agent.delete_process(process.id()).await;
                Err(e)
            }
        }
    }

    /// Starts a created process; returns the guest's pid.
    ///
    /// # Errors
    /// It was started before, or the guest cannot start it.
    pub async fn start_process(self: &Arc<Self>, container: &str, exec: &str) -> Result<u32> {
        let container = self.container(container)?;
        let process = container.process(exec)?;
        let machine = self.machine()?;
        process.begin_start()?;
        let pod = Arc::clone(self);
        let work = async move {
            match machine.agent.start_process(process.id()).await {
                Ok(pid) => {
                    process.started(pid);
                    if exec_is_init(&process) {
                        pod.describe_for_next_daemon().await;
                    }
                    machine.vm.mark_phase(phase::CONTAINER_RUNNING);
                    let exec_id = process.id().exec_id.clone();
                    let kind = if exec_id.is_empty() {
                        TaskEventKind::Start { pid }
                    } else {
                        TaskEventKind::ExecStarted { exec_id, pid }
                    };
                    pod.tell(&container, kind);
                    Ok(pid)
                }
                Err(e) => {
                    process.start_failed();
                    Err(PodError::from(e))
                }
            }
        };
        self.finish("starting the process", work).await
    }

    /// Forgets a process that does not run; with the init process, its container.
    ///
    /// # Errors
    /// The process runs.
    pub async fn delete(&self, container: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(container)?;
        let process = container.process(exec)?;
        let exit = match process.state() {
            ProcessState::Exited(exit) => exit,
            // Never started: nothing ran.
            ProcessState::Created => Exit::now(0),
            _ => return Err(process.wrong_state("delete")),
        };
        if let Some(stdio) = process.stdio()
            && timeout(self.environment.timeouts.stop, stdio.drained())
                .await
                .is_err()
        {
            warn!(
                pod = self.id(),
                container = container.id(),
                "output that nobody reads is dropped"
            );
        }
        if let Ok(machine) = self.machine() {
            match machine.agent.delete_process(process.id()).await {
                Err(e) if e.code() != super::ErrorCode::NotFound => {
                    warn!(pod = self.id(), container = container.id(), "{e}");
                }
                _ => {}
            }
        }
        process.exited(exit);
        process.close_stdio();
        let pid = process.pid();
        if exec.is_empty() {
            for process in container.processes() {
                process.exited(exit);
            }
            self.forget_container(&container).await;
            self.describe_for_next_daemon().await;
            self.tell(&container, TaskEventKind::Delete { pid, exit });
            info!(pod = self.id(), container = container.id(), "deleted");
        } else {
            container.remove_exec(exec);
        }
        Ok((pid, exit))
    }
}

fn exec_is_init(process: &Process) -> bool {
    process.id().exec_id.is_empty()
}

pub(super) fn owner(namespace: &str, container_id: &str) -> LogOwner {
    LogOwner {
        namespace: namespace.to_owned(),
        container_id: container_id.to_owned(),
    }
}

fn read_spec(bundle: &Path) -> Result<Value> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(PodError::io(format!("reading {}", path.display())))?;
    serde_json::from_slice(&text).map_err(|e| {
        PodError::invalid(
            "bundle",
            path.display().to_string(),
            format!("must hold an OCI runtime spec: {e}"),
        )
    })
}

/// A container without rootfs mounts has its files where the spec says.
fn rootfs_of_bundle(bundle: &Path, spec: &Value) -> RootfsMount {
    let path = spec
        .get("root")
        .and_then(|root| root.get("path"))
        .and_then(Value::as_str)
        .unwrap_or("rootfs");
    RootfsMount {
        fstype: "bind".to_owned(),
        source: bundle.join(path).to_string_lossy().into_owned(),
        target: String::new(),
        options: vec!["rbind".to_owned()],
    }
}

/// The Task API decides whether there is a terminal.
fn set_terminal(process: Option<&mut Value>, terminal: bool) {
    if let Some(process) = process.and_then(Value::as_object_mut) {
        process.insert("terminal".to_owned(), Value::Bool(terminal));
    }
}

pub(super) fn to_json(spec: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(spec)
        .map_err(|e| PodError::io("encoding the OCI spec")(std::io::Error::from(e)))
}
