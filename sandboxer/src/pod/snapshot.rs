//! Pods on disk: a running pod written to a folder, and a pod that goes on from one.
//!
//! The folder holds the machine (see [`vmm_core::Snapshot`]) and
//! `pod.json`, written last: what the pod was asked to be, and what the host mounted and
//! opened for its containers. Files of containers are not copied: what was mounted must be
//! there again. Byte streams of init processes are opened anew; an exec goes on without.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::{Instrument, info};
use vmm_core::vm::Vm;

use super::containers::owner;
use super::disks::PluggedDisk;
use super::process::{Exit, Process, ProcessState};
use super::stdio::{HostStdio, StdioPaths};
use super::storage::{ContainerStorage, Recipe};
use super::{
    Container, Machine, Phase, Pod, PodEnvironment, PodError, PodRequest, Result, lock, record,
};
use crate::agent::AgentEvent;
use crate::backend::MachineRequest;
use crate::rpc::cri::PodSandboxConfig;

const FILE: &str = "pod.json";
/// Counts changes of the file's fields.
const VERSION: u32 = 2;

/// What `pod.json` holds.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedPod {
    version: u32,
    id: String,
    netns: Option<PathBuf>,
    /// `runtime.v1.PodSandboxConfig`.
    config: Vec<u8>,
    pub(super) vcpus: u32,
    pub(super) memory_bytes: u64,
    pub(super) containers: Vec<SavedContainer>,
    /// Interfaces of the namespace that are connected, of a pod that runs.
    #[serde(default)]
    pub(super) network: Vec<u32>,
}

/// A container of a [`SavedPod`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedContainer {
    id: String,
    bundle: PathBuf,
    namespace: String,
    stdio: StdioPaths,
    pid: u32,
    /// The exit code of one that has ended.
    exit_code: Option<u32>,
    paused: bool,
    /// Its init process has not been started.
    #[serde(default)]
    created: bool,
    recipe: Recipe,
    pub(super) disks: Vec<PluggedDisk>,
}

impl Pod {
    /// Stops the pod's vCPUs; everything in it stands still.
    ///
    /// # Errors
    /// The pod is not ready, or a vCPU does not stop in time.
    pub async fn pause_machine(&self) -> Result<()> {
        let machine = self.machine()?;
        machine.vm.pause().await.map_err(|e| self.vm_error(e))?;
        info!(pod = self.id(), "paused");
        Ok(())
    }

    /// Lets a paused pod run again, with the time that it is now.
    ///
    /// # Errors
    /// The pod is not ready, or a device does not go on.
    pub async fn resume_machine(&self) -> Result<()> {
        let machine = self.machine()?;
        machine.vm.resume().await.map_err(|e| self.vm_error(e))?;
        machine.agent.setup_sandbox(self.setup()).await?;
        info!(pod = self.id(), "resumed");
        Ok(())
    }

    /// Writes the pod to `dir`, an empty folder, but for the guest memory that an earlier
    /// snapshot of it in `base` has. Its machine stays paused.
    ///
    /// # Errors
    /// The pod is not ready, a container is being created or started, `dir` is not empty, or
    /// it cannot be written: the pod runs on then.
    pub async fn save(self: &Arc<Self>, dir: &Path, base: Option<&Path>) -> Result<()> {
        let pod = Arc::clone(self);
        let dir = dir.to_owned();
        let base = base.map(Path::to_owned);
        // Carried through even if the caller goes away.
        let work = async move {
            let saved = pod.write(&dir, base.as_deref()).await;
            if saved.is_err()
                && pod.machine().is_ok()
                && let Err(e) = pod.resume_machine().await
            {
                tracing::error!(pod = pod.id(), "does not go on: {e}");
            }
            saved
        };
        self.operations
            .spawn(work)
            .await
            .unwrap_or(Err(PodError::Cancelled("the snapshot")))
    }

    /// Ends a pod that stands still: its guest is not asked.
    ///
    /// # Errors
    /// Its machine does not end in time.
    pub async fn discard(self: &Arc<Self>) -> Result<()> {
        if self.advance(|phase| *phase == Phase::Ready, Phase::Stopping) {
            self.end(self.environment.timeouts.stop, false).await?;
        }
        Ok(())
    }

    async fn write(&self, dir: &Path, base: Option<&Path>) -> Result<()> {
        let machine = self.machine()?;
        let containers = self.describe_containers()?;
        let failed = |what: &str| PodError::io(format!("{what} {}", dir.display()));
        let mut entries = fs::read_dir(dir).map_err(failed("reading"))?;
        if entries.next().is_some() {
            return Err(PodError::invalid(
                "dir",
                dir.display().to_string(),
                "must be an empty folder",
            ));
        }
        let saved = machine.vm.snapshot(dir, &self.label(), base).await;
        saved.map_err(|e| self.vm_error(e))?;
        let saved = self.saved(containers)?;
        let text = serde_json::to_vec_pretty(&saved)
            .map_err(|e| failed("describing the pod in")(std::io::Error::from(e)))?;
        record::replace(&dir.join(FILE), &text).map_err(failed("writing the pod to"))?;
        info!(pod = self.id(), "written to {}", dir.display());
        Ok(())
    }

    pub(super) fn saved(&self, containers: Vec<SavedContainer>) -> Result<SavedPod> {
        let request = self.machine_request()?;
        Ok(SavedPod {
            version: VERSION,
            id: self.id().to_owned(),
            netns: self.request.netns.clone(),
            config: self.request.config.encode_to_vec(),
            vcpus: request.vcpus,
            memory_bytes: request.memory_bytes,
            containers,
            network: Vec::new(),
        })
    }

    /// The containers that the next daemon can take over as they are.
    pub(super) fn describe_settled(&self) -> Vec<SavedContainer> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let settled = containers.iter().filter_map(|container| {
            let init = container.init();
            let exit_code = match init.state() {
                ProcessState::Creating => return None,
                ProcessState::Exited(exit) => Some(exit.code),
                _ => None,
            };
            let created = init.state() == ProcessState::Created;
            Some(SavedContainer::of(container, exit_code, created))
        });
        settled.collect()
    }

    fn describe_containers(&self) -> Result<Vec<SavedContainer>> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let describe = |container: &Arc<Container>| {
            let init = container.init();
            let exit_code = match init.state() {
                ProcessState::Running => None,
                ProcessState::Exited(exit) => Some(exit.code),
                _ => return Err(init.wrong_state("write to disk")),
            };
            Ok(SavedContainer::of(container, exit_code, false))
        };
        containers.iter().map(describe).collect()
    }

    /// Ties the machine's files to this pod.
    fn label(&self) -> String {
        format!(
            "pod {} of {}",
            self.id(),
            self.environment.backend.identity()
        )
    }

    /// Makes the pod of a folder, not started. Blocks.
    ///
    /// # Errors
    /// The folder holds no pod, one of another version, or the id is taken.
    pub fn from_disk(dir: &Path, environment: Arc<PodEnvironment>) -> Result<(Self, SavedPod)> {
        let saved = SavedPod::read(dir)?;
        let request = saved.request(dir)?;
        Ok((Self::create(request, environment)?, saved))
    }

    /// After [`Pod::begin_start`] of a pod [`Pod::from_disk`]: lets it go on from there.
    ///
    /// # Errors
    /// A mount is no longer possible, the machine cannot be restored, or its agent does not
    /// answer. The machine is gone then and the pod is of no further use.
    pub async fn restore(self: &Arc<Self>, dir: &Path, saved: &SavedPod) -> Result<()> {
        info!(pod = self.id(), "restoring from {}", dir.display());
        let mut vm = None;
        let restored = self.go_on(dir, saved, &mut vm).instrument(self.span());
        let restored = restored.await;
        self.started(restored, vm).await
    }

    async fn go_on(
        &self,
        dir: &Path,
        saved: &SavedPod,
        slot: &mut Option<Arc<dyn Vm>>,
    ) -> Result<mpsc::Receiver<AgentEvent>> {
        self.mount_again(saved).await?;
        let request = MachineRequest {
            vcpus: saved.vcpus,
            memory_bytes: saved.memory_bytes,
            disks: saved
                .containers
                .iter()
                .flat_map(|container| &container.disks)
                .map(|plugged| (plugged.slot, plugged.disk.clone()))
                .collect(),
            ..self.machine_request()?
        };
        let backend = &self.environment.backend;
        let restored = backend.restore(request, dir, &self.label()).await;
        let vm = Arc::clone(slot.insert(restored.map_err(|e| self.vm_error(e))?));
        self.bring_up(&vm, None, &saved.containers).await
    }

    /// What the guest has open must be there before the machine is.
    async fn mount_again(&self, saved: &SavedPod) -> Result<()> {
        let share = lock(&self.share)
            .as_ref()
            .map(|share| share.path().to_owned())
            .ok_or_else(|| self.wrong_phase("restore"))?;
        for saved in &saved.containers {
            let container = saved.container();
            let (share, id, recipe) = (share.clone(), saved.id.clone(), saved.recipe.clone());
            let mounting =
                tokio::task::spawn_blocking(move || ContainerStorage::prepare(&share, &id, recipe));
            let storage = mounting
                .await
                .unwrap_or(Err(PodError::Cancelled("mounting the files")))?;
            container.set_storage(storage);
            container.set_disks(saved.disks.clone());
            lock(&self.containers).insert(saved.id.clone(), Arc::new(container));
        }
        Ok(())
    }

    /// Takes a container's init process over from the guest.
    pub(super) async fn adopt(&self, machine: &Arc<Machine>, saved: &SavedContainer) -> Result<()> {
        let container = self.container(&saved.id)?;
        let init: &Process = container.init();
        if let Some(code) = saved.exit_code {
            init.exited(Exit::now(code));
            return Ok(());
        }
        let owner = owner(&saved.namespace, &saved.id);
        let host = HostStdio::open(&saved.stdio, &owner, &self.streams).await?;
        let stdio = self.wire_stdio(machine, init, host).await?;
        init.created(saved.pid, stdio);
        if saved.created {
            return Ok(());
        }
        init.begin_start()?;
        init.started(saved.pid);
        Ok(())
    }
}

impl SavedContainer {
    fn of(container: &Container, exit_code: Option<u32>, created: bool) -> Self {
        let init = container.init();
        Self {
            id: container.id().to_owned(),
            bundle: container.bundle().to_owned(),
            namespace: container.namespace().to_owned(),
            stdio: init.stdio_paths().clone(),
            pid: init.pid(),
            exit_code,
            paused: container.is_paused(),
            created,
            recipe: container.recipe().unwrap_or_default(),
            disks: container.disks(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The container, without its files and streams.
    pub(super) fn container(&self) -> Container {
        let stdio = self.stdio.clone();
        let container = Container::new(&self.id, &self.bundle, &self.namespace, stdio);
        container.set_paused(self.paused);
        container
    }
}

impl SavedPod {
    fn read(dir: &Path) -> Result<Self> {
        Self::read_file(&dir.join(FILE))
    }

    pub(super) fn request(&self, dir: &Path) -> Result<PodRequest> {
        let config = PodSandboxConfig::decode(self.config.as_slice()).map_err(|e| {
            PodError::invalid("dir", dir.display().to_string(), format!("damaged: {e}"))
        })?;
        let netns = self.netns.as_deref().unwrap_or_else(|| Path::new(""));
        PodRequest::new(&self.id, &netns.to_string_lossy(), config)
    }

    pub(super) fn read_file(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(PodError::io(format!("reading {}", path.display())))?;
        let saved: Self = serde_json::from_slice(&text).map_err(|e| {
            PodError::invalid("dir", path.display().to_string(), format!("damaged: {e}"))
        })?;
        if saved.version != VERSION {
            return Err(PodError::invalid(
                "dir",
                path.display().to_string(),
                format!(
                    "has version {}, this daemon reads {VERSION}: write it again",
                    saved.version
                ),
            ));
        }
        Ok(saved)
    }
}
