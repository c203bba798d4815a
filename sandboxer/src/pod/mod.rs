//! A pod: a virtual machine, the containers in it, and what the host holds for both.
//!
//! No lock is held while something is waited for. The phase of a pod and the state of a
//! process are [`watch`] values: operations move them on, and whoever has to wait watches.

mod cgroup;
mod container;
mod containers;
mod control;
mod disks;
mod error;
mod files;
mod grow;
mod lifecycle;
mod network;
mod oci;
mod process;
pub mod record;
pub(crate) mod recovery;
mod request;
mod resources;
mod snapshot;
mod stdio;
pub(crate) mod storage;
mod tasks;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use agent_api::rpc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;
use vmm_core::vm::{Vm, VmError, VmStats};

pub use container::Container;
pub use containers::{CreateContainer, CreateExec};
pub use error::{ErrorCode, PodError, Result};
pub use process::{Exit, KILLED, Process, ProcessState};
pub use request::{EVENTS_ANNOTATION, PodRequest};
pub use resources::MachineSize;
pub use snapshot::SavedPod;
pub use stdio::{LogOwner, StdioPaths};
pub(crate) use stdio::{Outlet, StreamEnd, Streams};
pub use storage::RootfsMount;
pub use tasks::TASKS_EXTENSION;

use self::cgroup::HostCgroup;
use self::disks::DiskSlots;
use self::files::PodFiles;
use self::network::{Follower, PodNetwork};
use self::oci::PodFile;
use self::record::Record;
use self::storage::Share;
use self::tasks::TaskList;
use crate::agent::Agent;
use crate::backend::SandboxBackend;
use crate::config::{self, Timeouts};
use crate::events::{EventSink, TaskEvent, TaskEventKind};

/// What all pods of a daemon share.
#[derive(Debug)]
pub struct PodEnvironment {
    /// Folder that holds one folder per pod.
    pub dir: PathBuf,
    /// Makes the machines.
    pub backend: Arc<dyn SandboxBackend>,
    /// Sizes of machines without limits.
    pub vm: config::Vm,
    /// How long to wait for what, as it applies on this host.
    pub timeouts: Timeouts,
    /// Is told what happens to containers.
    pub events: EventSink,
}

/// Where a pod is in its life. It only moves down this list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its folder exists.
    Created,
    /// Its machine boots.
    Starting,
    /// Containers can run.
    Ready,
    /// Its machine is being ended.
    Stopping,
    /// Its machine has ended.
    NotReady {
        /// 0 after a stop, 137 when the machine ended by itself.
        exit: Exit,
        /// Why it ended.
        reason: String,
    },
}

impl Phase {
    /// Name for error messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "not started",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::NotReady { .. } => "not ready",
        }
    }
}

/// Points in the start of a pod that its machine cannot see, for [`VmStats::phases`].
mod phase {
    pub(super) const AGENT_READY: &str = "agent ready";
    pub(super) const SANDBOX_SET_UP: &str = "sandbox set up";
    pub(super) const CONTAINER_RUNNING: &str = "container running";
    pub(super) const EXIT_SEEN: &str = "exit seen";
}

/// The running part of a pod.
#[derive(Debug)]
struct Machine {
    vm: Arc<dyn Vm>,
    agent: Arc<dyn Agent>,
    ready: rpc::Ready,
    disks: DiskSlots,
    online_cpus: AtomicU32,
}

impl Machine {
    fn online_cpus(&self) -> u32 {
        self.online_cpus.load(Ordering::Acquire)
    }

    fn set_online_cpus(&self, count: u32) {
        self.online_cpus.store(count, Ordering::Release);
    }
}

/// The pod's network, while it has one.
#[derive(Debug)]
enum Network {
    /// The pod starts.
    Connected(PodNetwork),
    /// The pod runs.
    Followed(Follower),
}

/// The pod's network as it was last.
#[derive(Debug, Default)]
struct NetworkNote {
    /// For the agent.
    description: rpc::Network,
    /// For the next daemon; see [`PodNetwork::connected`].
    connected: Vec<u32>,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    request: PodRequest,
    environment: Arc<PodEnvironment>,
    created_at: SystemTime,
    dir: PathBuf,
    files: Vec<PodFile>,
    phase: watch::Sender<Phase>,
    /// Cancelled to give up a start.
    give_up: CancellationToken,
    machine: Mutex<Option<Arc<Machine>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    tasks: Mutex<TaskList>,
    streams: Arc<Streams>,
    /// Is told what happens to its containers.
    events: EventSink,
    /// Operations under way; the pod's folder outlives them.
    operations: TaskTracker,
    network: Mutex<Option<Network>>,
    network_note: Mutex<NetworkNote>,
    share: Mutex<Option<Share>>,
    /// Where the host accounts for its machine.
    cgroup: Mutex<Option<HostCgroup>>,
    /// The pod is being described for the next daemon.
    recording: tokio::sync::Mutex<()>,
    /// Last: removed after everything in it is released.
    folder: Mutex<Option<PodFolder>>,
}

/// The pod's folder, removed with the pod.
#[derive(Debug)]
struct PodFolder(PathBuf);

impl PodFolder {
    fn create(path: PathBuf, id: &str) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Err(PodError::Exists {
                what: "sandbox",
                id: id.to_owned(),
            }),
            Err(e) => Err(PodError::io(format!("creating {}", path.display()))(e)),
        }
    }
}

impl Drop for PodFolder {
    fn drop(&mut self) {
        if let Err(e) = storage::remove_tree(&self.0) {
            warn!("cannot remove {}: {e}", self.0.display());
        }
    }
}

impl Pod {
    /// Makes the pod's folder, share and record. Blocks.
    ///
    /// # Errors
    /// The id is taken, the network namespace cannot be used, or the host refuses;
    /// nothing is left then.
    pub fn create(request: PodRequest, environment: Arc<PodEnvironment>) -> Result<Self> {
        let created_at = SystemTime::now();
        if let Some(path) = &request.netns {
            network::check(path)?;
        }
        let dir = environment.dir.join(&request.id);
        let folder = PodFolder::create(dir.clone(), &request.id)?;
        let share = Share::create(&dir)?;
        let files = PodFiles {
            hostname: request.hostname(),
            dns: request.config.dns_config.as_ref(),
            debug_shell: environment.vm.debug_console.as_deref(),
        }
        .write(share.path())?;
        let linux = request.config.linux.as_ref();
        let netns = request.netns.as_deref().unwrap_or_else(|| Path::new(""));
        Record::new(
            &request.id,
            nanoseconds(created_at),
            &netns.to_string_lossy(),
            linux.map_or("", |linux| linux.cgroup_parent.as_str()),
        )
        .write(&dir)?;
        Ok(Self {
            events: events_of(&request, &environment),
            request,
            environment,
            created_at,
            dir,
            files,
            phase: watch::Sender::new(Phase::Created),
            give_up: CancellationToken::new(),
            machine: Mutex::new(None),
            containers: Mutex::new(HashMap::new()),
            tasks: Mutex::new(TaskList::default()),
            streams: Arc::new(Streams::default()),
            operations: TaskTracker::new(),
            network: Mutex::new(None),
            network_note: Mutex::default(),
            share: Mutex::new(Some(share)),
            cgroup: Mutex::default(),
            recording: tokio::sync::Mutex::default(),
            folder: Mutex::new(Some(folder)),
        })
    }

    /// The pod's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.request.id
    }

    /// What it was asked to be.
    #[must_use]
    pub fn request(&self) -> &PodRequest {
        &self.request
    }

    /// When it was created.
    #[must_use]
    pub fn created_at(&self) -> SystemTime {
        self.created_at
    }

    /// The pod's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where its Task API is served.
    #[must_use]
    pub fn task_socket(&self) -> PathBuf {
        self.dir.join("task.sock")
    }

    /// What callers of the Task API connect to instead of fifos.
    pub(crate) fn streams(&self) -> Arc<Streams> {
        Arc::clone(&self.streams)
    }

    /// Its phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Host pid of the process that runs its vCPUs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.machine()
            .map_or_else(|_| std::process::id(), |machine| machine.vm.pid())
    }

    /// Figures of its VM, while there is one.
    #[must_use]
    pub fn vm_stats(&self) -> Option<VmStats> {
        self.machine().ok().map(|machine| machine.vm.stats())
    }

    /// What the agent said when it was ready, while there is one.
    #[must_use]
    pub fn guest(&self) -> Option<rpc::Ready> {
        self.machine().ok().map(|machine| machine.ready.clone())
    }

    /// Name of the backend that runs its VM.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.environment.backend.name()
    }

    /// Ids of its containers, sorted.
    #[must_use]
    pub fn container_ids(&self) -> Vec<String> {
        let mut ids: Vec<_> = lock(&self.containers).keys().cloned().collect();
        ids.sort();
        ids
    }

    /// One of its containers.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| PodError::not_found("container", id))
    }

    fn tell(&self, container: &Container, kind: TaskEventKind) {
        self.events.send(TaskEvent {
            namespace: container.namespace().to_owned(),
            container_id: container.id().to_owned(),
            kind,
        });
    }

    /// The machine, while the pod is ready or stopping.
    fn machine(&self) -> Result<Arc<Machine>> {
        lock(&self.machine)
            .clone()
            .ok_or_else(|| self.wrong_phase("use"))
    }

    fn vm_error(&self, source: VmError) -> PodError {
        PodError::Vm {
            pod: self.id().to_owned(),
            source,
        }
    }

    fn wrong_phase(&self, action: &'static str) -> PodError {
        PodError::State {
            action,
            what: "sandbox",
            id: self.id().to_owned(),
            state: match self.phase() {
                Phase::NotReady { reason, .. } => format!("not ready ({reason})"),
                phase => phase.name().to_owned(),
            },
        }
    }
}

/// Who is told of a pod's containers: who asked for the pod, else who the configuration names.
fn events_of(request: &PodRequest, environment: &PodEnvironment) -> EventSink {
    let own = request.events.as_deref();
    own.map_or_else(|| environment.events.clone(), EventSink::to_containerd)
}

/// Nanoseconds since the epoch.
fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Locks; data behind our locks is valid after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
