//! A container of a pod.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disks::PluggedDisk;
use super::error::{PodError, Result};
use super::process::Process;
use super::stdio::StdioPaths;
use super::storage::{ContainerStorage, Recipe};
use crate::agent::ProcessId;

/// A container: its init process, its execs and its files.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: PathBuf,
    namespace: String,
    init: Arc<Process>,
    paused: AtomicBool,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    storage: Mutex<Option<ContainerStorage>>,
    disks: Mutex<Vec<PluggedDisk>>,
}

impl Container {
    pub(super) fn new(id: &str, bundle: &Path, namespace: &str, stdio: StdioPaths) -> Self {
        let init = ProcessId {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            namespace: namespace.to_owned(),
            init: Arc::new(Process::new(init, stdio)),
            paused: AtomicBool::new(false),
            execs: Mutex::new(HashMap::new()),
            storage: Mutex::new(None),
            disks: Mutex::default(),
        }
    }

    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The folder with its `config.json`.
    #[must_use]
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// containerd's namespace; empty if the caller named none.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its first process.
    #[must_use]
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Whether it is frozen.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    /// The init process for an empty `exec_id`, else that exec.
    ///
    /// # Errors
    /// There is no such exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| PodError::not_found("exec", exec_id))
    }

    /// Reserves an exec id.
    pub(super) fn add_exec(&self, exec_id: &str, stdio: StdioPaths) -> Result<Arc<Process>> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(exec_id) {
            return Err(PodError::Exists {
                what: "exec",
                id: exec_id.to_owned(),
            });
        }
        let id = ProcessId {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let process = Arc::new(Process::new(id, stdio));
        execs.insert(exec_id.to_owned(), Arc::clone(&process));
        Ok(process)
    }

    pub(super) fn remove_exec(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    pub(super) fn set_storage(&self, storage: ContainerStorage) {
        *lock(&self.storage) = Some(storage);
    }

    /// What its files are made of, while it has any.
    pub(super) fn recipe(&self) -> Option<Recipe> {
        lock(&self.storage).as_ref().map(|s| s.recipe().clone())
    }

    /// Takes the files away; the caller drops them where blocking is allowed.
    pub(super) fn take_storage(&self) -> Option<ContainerStorage> {
        lock(&self.storage).take()
    }

    /// The disks it has in the machine.
    pub(super) fn disks(&self) -> Vec<PluggedDisk> {
        lock(&self.disks).clone()
    }

    pub(super) fn set_disks(&self, disks: Vec<PluggedDisk>) {
        *lock(&self.disks) = disks;
    }

    /// Takes the disks away; the caller unplugs them.
    pub(super) fn take_disks(&self) -> Vec<PluggedDisk> {
        std::mem::take(&mut *lock(&self.disks))
    }

    /// All its processes, execs first.
    pub(super) fn processes(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = lock(&self.execs).values().cloned().collect();
        all.push(Arc::clone(&self.init));
        all
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
