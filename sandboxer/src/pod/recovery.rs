//! Pods whose machines outlive their daemon.
//!
//! `live.json` in the pod's folder says what the next daemon has to know: the pod as it was
//! asked for, its containers, and what was mounted and connected for them. It is replaced after
//! each change. Taking a pod over is what restoring one from disk is, but for the machine, which
//! has run on: the agent dials again and tells of exits meanwhile, output streams are opened
//! anew, and stdin is at its end. Execs are forgotten.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tokio::sync::mpsc;
use tracing::{Instrument, error, info, warn};
use vmm_core::vm::Vm;

use super::record::{self, Record};
use super::storage::{ContainerStorage, Share};
use super::{
    Network, Phase, Pod, PodEnvironment, PodError, PodFiles, PodFolder, PodNetwork, Result,
    SavedPod, lock,
};
use crate::agent::AgentEvent;
use crate::backend::MachineRequest;
use crate::causes::with_causes;

const FILE: &str = "live.json";

/// A pod of an earlier daemon whose machine may run.
#[derive(Debug)]
pub(crate) struct LeftPod {
    /// Its folder.
    pub(crate) dir: PathBuf,
    saved: SavedPod,
}

/// Pods that an earlier daemon left in `dir`, described for us. Blocks.
pub(crate) fn left_pods(dir: &Path) -> Vec<LeftPod> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let folders = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    let mut pods = Vec::new();
    for dir in folders {
        let path = dir.join(FILE);
        if !path.exists() {
            continue;
        }
        match SavedPod::read_file(&path) {
            Ok(saved) => pods.push(LeftPod { dir, saved }),
            Err(e) => warn!("a pod cannot be taken over: {e}"),
        }
    }
    pods
}

impl Pod {
    /// Writes what the next daemon has to know, where machines outlive daemons.
    pub(super) async fn describe_for_next_daemon(&self) {
        if !self.environment.backend.outlives_daemon() {
            return;
        }
        let _recording = self.recording.lock().await;
        if self.phase() != Phase::Ready {
            return;
        }
        let saved = self.saved(self.describe_settled());
        let network = lock(&self.network_note).connected.clone();
        let path = self.dir.join(FILE);
        let write = move || {
            let mut saved = saved?;
            saved.network = network;
            let failed = || PodError::io(format!("writing {}", path.display()));
            let text = serde_json::to_vec_pretty(&saved).map_err(std::io::Error::from);
            text.and_then(|text| record::replace(&path, &text))
                .map_err(failed())
        };
        let written = tokio::task::spawn_blocking(write).await;
        if let Ok(Err(e)) = written {
            error!(
                pod = self.id(),
                "the next daemon will not know of this pod: {}",
                with_causes(&e)
            );
        }
    }

    /// Makes the pod that an earlier daemon left, about to be taken over. Blocks.
    ///
    /// # Errors
    /// What the earlier daemon made is not there any more.
    pub(crate) fn left(pod: &LeftPod, environment: Arc<PodEnvironment>) -> Result<Self> {
        let dir = pod.dir.clone();
        let request = pod.saved.request(&dir)?;
        let record = Record::read(&dir).map_err(PodError::io(format!(
            "reading the record in {}",
            dir.display()
        )))?;
        // First, so that whatever fails takes the folder along.
        let folder = PodFolder(dir.clone());
        let share = Share::adopt(&dir)?;
        let network = match &request.netns {
            Some(path) if !pod.saved.network.is_empty() => {
                PodNetwork::adopt(path, &pod.saved.network)
                    .inspect_err(|e| warn!(pod = request.id, "its network is gone: {e}"))
                    .ok()
            }
            _ => None,
        };
        Record::new(
            &request.id,
            record.created_at_ns,
            &record.netns_path,
            &record.cgroup_parent,
        )
        .write(&dir)?;
        let pod_with = Self {
            events: super::events_of(&request, &environment),
            created_at: UNIX_EPOCH + Duration::from_nanos(record.created_at_ns),
            files: PodFiles::written(),
            phase: tokio::sync::watch::Sender::new(Phase::Starting),
            give_up: tokio_util::sync::CancellationToken::new(),
            machine: Default::default(),
            containers: Default::default(),
            tasks: Default::default(),
            streams: Default::default(),
            operations: tokio_util::task::TaskTracker::new(),
            network: std::sync::Mutex::new(network.map(Network::Connected)),
            network_note: Default::default(),
            share: std::sync::Mutex::new(Some(share)),
            cgroup: Default::default(),
            recording: tokio::sync::Mutex::default(),
            folder: std::sync::Mutex::new(Some(folder)),
            dir,
            request,
            environment,
        };
        if let Some(Network::Connected(network)) = lock(&pod_with.network).as_ref() {
            pod_with.note_network(network);
        }
        for saved in &pod.saved.containers {
            let container = saved.container();
            let share = pod.dir.join("shared");
            let recipe = saved.recipe().clone();
            container.set_storage(ContainerStorage::adopt(&share, saved.id(), recipe)?);
            lock(&pod_with.containers).insert(saved.id().to_owned(), Arc::new(container));
        }
        Ok(pod_with)
    }

    /// Takes the running machine of a pod [`Pod::left`] over.
    ///
    /// # Errors
    /// The machine has ended, or its agent does not answer: it is ended then.
    pub(crate) async fn take_over(self: &Arc<Self>, pod: &LeftPod) -> Result<()> {
        let mut vm = None;
        let up = self.meet_again(pod, &mut vm).instrument(self.span()).await;
        self.started(up, vm).await
    }

    async fn meet_again(
        &self,
        pod: &LeftPod,
        slot: &mut Option<Arc<dyn Vm>>,
    ) -> Result<mpsc::Receiver<AgentEvent>> {
        let request = MachineRequest {
            vcpus: pod.saved.vcpus,
            memory_bytes: pod.saved.memory_bytes,
            ..self.machine_request()?
        };
        let found = self.environment.backend.recover(request).await;
        let found = found.map_err(|e| self.vm_error(e))?;
        let Some(vm) = found else {
            return Err(PodError::Cancelled("the machine, which ended meanwhile,"));
        };
        let vm = Arc::clone(slot.insert(vm));
        let events = self.meet(&vm, None, &pod.saved.containers, false).await?;
        info!("taken over from an earlier daemon");
        Ok(events)
    }
}
