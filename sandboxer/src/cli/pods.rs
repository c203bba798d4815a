//! Finding pods: of the running daemon, of daemons inside other CLI processes, and those that
//! are only remembered.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api;
use serde::Serialize;
use serde_json::Value;

use super::args::Global;
use super::client::{Controller, ProcessName, READY, Task};
use super::daemon::places;
use super::error::{CliError, Result};
use super::store::{PodRecord, PodStore, choose};
use crate::rpc::controller::ControllerStatusResponse;

/// A pod that a daemon may have.
#[derive(Clone, Debug)]
pub(super) struct PodRef {
    pub(super) id: String,
    pub(super) record: Option<PodRecord>,
    /// The daemon that should have it; `None` when it does not answer.
    pub(super) controller: Option<Controller>,
}

/// A pod and what its daemon says about it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) pod: PodRef,
    status: Option<ControllerStatusResponse>,
    info: Value,
}

/// A container as `ps` and `inspect` show it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ContainerView {
    pub(super) id: String,
    /// created, running, stopped, paused, or unknown when the pod does not run.
    pub(super) state: String,
    pub(super) exit_code: Option<u32>,
    /// In the guest's numbering.
    pub(super) pid: u32,
    pub(super) bundle: String,
}

/// All pods that can be found.
pub(super) async fn all(global: &Global) -> Result<Vec<PodRef>> {
    let mut records = PodStore::open().records();
    let mut pods = Vec::new();
    for (index, place) in places(&global.address, &global.dir).into_iter().enumerate() {
        let controller = match Controller::connect(&place.address).await {
            // The configured daemon must be reachable; another one may be ending.
            Err(e) if index == 0 => return Err(e),
            other => other.ok().flatten(),
        };
        let mut ids = if controller.is_some() {
            pod_ids(&place.dir)
        } else {
            Vec::new()
        };
        let mine = |r: &PodRecord| r.address == place.address;
        ids.extend(records.iter().filter(|r| mine(r)).map(|r| r.id.clone()));
        ids.sort();
        ids.dedup();
        for id in ids {
            let at = records.iter().position(|r| r.id == id && mine(r));
            pods.push(PodRef {
                id,
                record: at.map(|at| records.swap_remove(at)),
                controller: controller.clone(),
            });
        }
    }
    // Daemons that were inside processes long gone; others have a --address of their own.
    let orphans = records.into_iter().filter(|r| !r.address.exists());
    pods.extend(orphans.map(|record| PodRef {
        id: record.id.clone(),
        record: Some(record),
        controller: None,
    }));
    Ok(pods)
}

/// Ids of the pods in a daemon's state folder.
fn pod_ids(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().join("sandbox.json").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// The pod that a user means, and its status.
pub(super) async fn find(global: &Global, wanted: &str) -> Result<Found> {
    let pods = all(global).await?;
    let name = |p: &PodRef| p.record.as_ref().and_then(|r| r.name.clone());
    let names: Vec<(PodRef, Option<String>)> =
        pods.into_iter().map(|p| (p.clone(), name(&p))).collect();
    let (pod, _) = choose(wanted, &names, |p| &p.0.id, |p| p.1.as_deref())?;
    Found::load(pod.clone()).await
}

impl PodRef {
    /// What the user calls it.
    pub(super) fn title(&self) -> &str {
        let name = self.record.as_ref().and_then(|r| r.name.as_deref());
        name.unwrap_or(&self.id)
    }
}

impl Found {
    pub(super) async fn load(pod: PodRef) -> Result<Self> {
        let status = match &pod.controller {
            Some(controller) => controller.status(&pod.id).await?,
            None => None,
        };
        let info = status
            .as_ref()
            .and_then(|s| s.info.get("info"))
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or(Value::Null);
        Ok(Self { pod, status, info })
    }

    /// As the Controller says, or `GONE` when no daemon has it any more.
    pub(super) fn state(&self) -> &str {
        self.status.as_ref().map_or("GONE", |s| s.state.as_str())
    }

    /// The same in a word, finer than what the Controller's states tell.
    pub(super) fn phase(&self) -> &str {
        let told = self.info.get("processStatus").and_then(Value::as_str);
        match (told, self.status.is_some()) {
            (Some("not ready"), _) => "ended",
            (Some(told), _) => told,
            (None, true) => "unknown",
            (None, false) => "gone",
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state() == READY
    }

    /// Details that the daemon gives.
    pub(super) fn info(&self) -> &Value {
        &self.info
    }

    /// Its folder, while a daemon has it.
    pub(super) fn dir(&self) -> Option<&Path> {
        self.info.get("dir").and_then(Value::as_str).map(Path::new)
    }

    /// Why it does not run, if the daemon says so.
    pub(super) fn reason(&self) -> Option<&str> {
        self.info
            .get("reason")
            .and_then(Value::as_str)
            .filter(|reason| !reason.is_empty())
    }

    /// Seconds and nanoseconds since the epoch.
    pub(super) fn created_at(&self) -> Option<std::time::SystemTime> {
        let at = self.status.as_ref()?.created_at?;
        at.try_into().ok()
    }

    /// The Task API of a pod that runs.
    pub(super) async fn task(&self) -> Result<Task> {
        let Some(status) = self.status.as_ref().filter(|_| self.is_ready()) else {
            let title = self.pod.title();
            let why = self.reason().unwrap_or("it has ended");
            return Err(CliError::new(format!("pod {title} does not run: {why}"))
                .next(format!("`kuasar-ctl rm {title}` removes it")));
        };
        Task::connect(&status.address).await
    }

    pub(super) fn container_ids(&self) -> Vec<String> {
        let ids = self.info.get("containers").and_then(Value::as_array);
        let mut ids: Vec<String> = ids
            .into_iter()
            .flatten()
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();
        ids.sort();
        ids
    }

    /// The container that a user means: the only one, or the one named.
    pub(super) fn container(&self, wanted: Option<&str>) -> Result<String> {
        let ids = self.container_ids();
        if let Some(wanted) = wanted {
            return choose(wanted, &ids, String::as_str, |_| None)
                .cloned()
                .map_err(|e| {
                    let title = self.pod.title();
                    CliError::new(format!("pod {title}: {}", e.what))
                        .next(format!("it has: {}", ids.join(", ")))
                });
        }
        match ids.as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(CliError::new(format!(
                "pod {} has no container",
                self.pod.title()
            ))),
            several => Err(CliError::new(format!(
                "pod {} has several containers",
                self.pod.title()
            ))
            .next(format!("choose one with -c: {}", several.join(", ")))),
        }
    }

    /// The state of every container.
    pub(super) async fn containers(&self) -> Vec<ContainerView> {
        let task = self.task().await.ok();
        let mut views = Vec::new();
        for id in self.container_ids() {
            let name = ProcessName {
                container: id.clone(),
                exec: String::new(),
            };
            let state = match &task {
                Some(task) => task.state(&name).await.ok(),
                None => None,
            };
            views.push(view(id, state));
        }
        views
    }

    /// Folders with the container's files, topmost first, where this CLI made it.
    pub(super) fn layers(&self) -> Vec<PathBuf> {
        let Some(record) = &self.pod.record else {
            return Vec::new();
        };
        let upper = record.data.join("upper");
        let upper = upper.is_dir().then_some(upper);
        upper
            .into_iter()
            .chain(record.roots.iter().cloned())
            .collect()
    }

    /// Why the pod does not run; `None` while it does.
    pub(super) fn failed(&self) -> Option<String> {
        if self.is_ready() {
            return None;
        }
        Some(self.reason().unwrap_or("it was stopped").to_owned())
    }
}

fn view(id: String, state: Option<api::StateResponse>) -> ContainerView {
    let Some(state) = state else {
        return ContainerView {
            id,
            state: "unknown".to_owned(),
            exit_code: None,
            pid: 0,
            bundle: String::new(),
        };
    };
    let status = state.status.enum_value_or_default();
    ContainerView {
        id,
        state: format!("{status:?}").to_lowercase(),
        exit_code: (status == api::Status::STOPPED).then_some(state.exit_status),
        pid: state.pid,
        bundle: state.bundle,
    }
}
