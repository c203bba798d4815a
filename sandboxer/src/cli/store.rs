//! What this CLI remembers of the pods it started: one folder each, gone with the pod.
//!
//! `<state>/pods/<pod>/` (state: `/run/kuasar-ctl`) holds the record, the bundle and the
//! fifos; it is forgotten at a reboot like the pod itself. `<cache>/containers/<pod>/` holds
//! what can grow large: the writable layer and the logs.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::error::{CliError, Doing, Result};
use crate::image::ImageStore;
use crate::pod::storage::remove_tree;

const RECORD: &str = "pod.json";
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// What is remembered of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodRecord {
    /// Id of the pod, and of its container.
    pub(super) id: String,
    pub(super) name: Option<String>,
    /// Image reference or root folder, as the user gave it.
    pub(super) image: String,
    pub(super) command: Vec<String>,
    /// Root file system for looking up users: writable layer first.
    pub(super) roots: Vec<PathBuf>,
    pub(super) data: PathBuf,
    /// What asks the container to end.
    pub(super) stop_signal: i32,
    /// Socket of the daemon that runs it.
    pub(super) address: PathBuf,
    pub(super) detached: bool,
    /// Nanoseconds since the epoch.
    pub(super) created_at_ns: u64,
}

/// The folders of all pods this user's CLI started.
#[derive(Clone, Debug)]
pub(super) struct PodStore {
    pods: PathBuf,
    containers: PathBuf,
}

/// The folders of one pod; removed on drop unless kept.
#[derive(Debug)]
pub(super) struct PodFolder {
    pub(super) state: PathBuf,
    pub(super) data: PathBuf,
    kept: bool,
}

/// Where short-lived files of this CLI are: `KUASAR_CTL_DIR`, else below `/run` for root and
/// in the user's runtime folder otherwise.
pub(super) fn state_root() -> PathBuf {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if let Some(dir) = var("KUASAR_CTL_DIR") {
        return dir;
    }
    if rustix::process::geteuid().is_root() {
        return "/run/kuasar-ctl".into();
    }
    var("XDG_RUNTIME_DIR")
        .unwrap_or_else(std::env::temp_dir)
        .join("kuasar-ctl")
}

/// Creates `path` and its parents for this user only.
pub(super) fn private_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .doing(|| format!("create {}", path.display()))
}

impl PodStore {
    pub(super) fn open() -> Self {
        Self::at(&state_root(), &ImageStore::default_cache())
    }

    fn at(state: &Path, cache: &Path) -> Self {
        // The writable layer of an overlay mount cannot itself be on one.
        let data = if is_overlay(cache) { state } else { cache };
        Self {
            pods: state.join("pods"),
            containers: data.join("containers"),
        }
    }

    /// Makes the folders of a new pod and remembers it, and removes data of pods that are
    /// long gone. A name is given once per daemon.
    pub(super) fn create(&self, record: &mut PodRecord) -> Result<PodFolder> {
        private_dir(&self.pods)?;
        private_dir(&self.containers)?;
        let _lock = self.lock()?;
        self.collect_garbage();
        let taken = |r: &PodRecord| r.name == record.name && r.address == record.address;
        if let (Some(name), Some(other)) = (&record.name, self.records().into_iter().find(taken)) {
            return Err(
                CliError::new(format!("the name {name} is taken by pod {}", other.id))
                    .next(format!("`kuasar-ctl rm {name}`, or choose another name")),
            );
        }
        let create = |dir: &Path| {
            let made = DirBuilder::new().mode(0o700).create(dir);
            made.doing(|| format!("create {}", dir.display()))
        };
        let state = self.pods.join(&record.id);
        create(&state)?;
        // Owned only now: a folder that was there belongs to another pod.
        let folder = PodFolder {
            state,
            data: self.containers.join(&record.id),
            kept: false,
        };
        create(&folder.data)?;
        record.data.clone_from(&folder.data);
        folder.write(record)?;
        Ok(folder)
    }

    /// Held while names are compared; released when dropped.
    fn lock(&self) -> Result<File> {
        let path = self.pods.join(".lock");
        let doing = || format!("lock {}", path.display());
        let file = File::create(&path).doing(doing)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).doing(doing)?;
        Ok(file)
    }

    /// A folder that was created before, to be removed on drop.
    pub(super) fn reopen(&self, record: &PodRecord) -> PodFolder {
        PodFolder {
            state: self.pods.join(&record.id),
            data: record.data.clone(),
            kept: false,
        }
    }

    /// Every pod remembered; records that cannot be read are passed over.
    pub(super) fn records(&self) -> Vec<PodRecord> {
        let entries = fs::read_dir(&self.pods).into_iter().flatten().flatten();
        let mut records: Vec<PodRecord> = entries
            .filter_map(|entry| fs::read(entry.path().join(RECORD)).ok())
            .filter_map(|text| serde_json::from_slice(&text).ok())
            .collect();
        records.sort_by_key(|r| r.created_at_ns);
        records
    }

    /// What a crash, a killed CLI or a reboot left: pods whose daemon was inside a process
    /// that is gone, and data without a pod.
    fn collect_garbage(&self) {
        let orphans = self.records().into_iter();
        for record in orphans.filter(|r| !r.detached && !r.address.exists()) {
            drop(self.reopen(&record));
        }
        for entry in fs::read_dir(&self.containers)
            .into_iter()
            .flatten()
            .flatten()
        {
            let gone = self.pods.join(entry.file_name()).symlink_metadata();
            if gone.is_err_and(|e| e.kind() == ErrorKind::NotFound) {
                remove(&entry.path());
            }
        }
    }
}

impl PodFolder {
    /// Remembers the pod, under another name first so that readers see all or nothing.
    fn write(&self, record: &PodRecord) -> Result<()> {
        let text = serde_json::to_vec(record).doing(|| "write the pod's record".to_owned())?;
        let (aside, path) = (self.state.join(".record"), self.state.join(RECORD));
        fs::write(&aside, text)
            .and_then(|()| fs::rename(&aside, &path))
            .doing(|| format!("write {}", path.display()))
    }

    /// The pod outlives this process.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }

    pub(super) fn sub_dir(&self, parent: &Path, name: &str) -> Result<PathBuf> {
        let path = parent.join(name);
        fs::create_dir(&path).doing(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for PodFolder {
    fn drop(&mut self) {
        if !self.kept {
            // Data first: without state it would be garbage, never the reverse.
            remove(&self.data);
            remove(&self.state);
        }
    }
}

/// Removes a folder, unless something is mounted in it: that would not be ours to delete.
fn remove(path: &Path) {
    if let Err(e) = remove_tree(path) {
        tracing::warn!(path = %path.display(), "cannot remove: {e}");
    }
}

/// Whether `path`, or the nearest parent that exists, is on overlayfs.
fn is_overlay(path: &Path) -> bool {
    path.ancestors()
        .find_map(|p| rustix::fs::statfs(p).ok())
        .is_some_and(|fs| u64::try_from(fs.f_type).is_ok_and(|t| t == OVERLAYFS_MAGIC))
}

/// Chooses the pod that a user means by a name, an id or the beginning of an id.
pub(super) fn choose<'a, T>(
    wanted: &str,
    pods: &'a [T],
    id: impl Fn(&T) -> &str,
    name: impl Fn(&T) -> Option<&str>,
) -> Result<&'a T> {
    let exact = pods
        .iter()
        .find(|p| id(p) == wanted || name(p) == Some(wanted));
    if let Some(pod) = exact {
        return Ok(pod);
    }
    let mut by_prefix = pods
        .iter()
        .filter(|p| !wanted.is_empty() && id(p).starts_with(wanted));
    match (by_prefix.next(), by_prefix.next()) {
        (Some(pod), None) => Ok(pod),
        (Some(a), Some(b)) => Err(CliError::new(format!(
            "{wanted} is the beginning of several ids, {} and {} among them",
            id(a),
            id(b)
        ))
        .next("give more of the id")),
        (None, _) => Err(CliError::new(format!("no pod is called {wanted}"))
            .next("`kuasar-ctl ps` lists the pods")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> PodRecord {
        PodRecord {
            id: id.to_owned(),
            name: None,
            image: "image.tar".to_owned(),
            command: Vec::new(),
            roots: Vec::new(),
            data: PathBuf::new(),
            stop_signal: 15,
            address: "/run/x.sock".into(),
            detached: true,
            created_at_ns: 1,
        }
    }

    #[test]
    fn folders_live_as_long_as_their_pod() {
        let dir = tempfile::tempdir().unwrap();
        let store = PodStore::at(&dir.path().join("run"), &dir.path().join("cache"));
        let mut written = record("p1");
        let folder = store.create(&mut written).unwrap();
        assert_eq!(written.data, folder.data);
        assert_eq!(store.records(), [written.clone()]);
        store.create(&mut record("p1")).unwrap_err();
        let (state, data) = (folder.state.clone(), folder.data.clone());
        folder.keep();
        assert!(state.exists() && data.exists());
        drop(store.reopen(&written));
        assert!(!state.exists() && !data.exists());
        assert!(store.records().is_empty());
    }

    #[test]
    fn data_without_a_pod_is_collected() {
        let dir = tempfile::tempdir().unwrap();
        let store = PodStore::at(&dir.path().join("run"), &dir.path().join("cache"));
        let folder = store.create(&mut record("old")).unwrap();
        fs::remove_dir_all(&folder.state).unwrap();
        let stale = folder.data.clone();
        folder.keep();
        let _new = store.create(&mut record("new")).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn pods_of_daemons_inside_processes_that_are_gone_are_collected() {
        let dir = tempfile::tempdir().unwrap();
        let store = PodStore::at(&dir.path().join("run"), &dir.path().join("cache"));
        let foreground = |id: &str, address: &Path| PodRecord {
            detached: false,
            address: address.to_owned(),
            ..record(id)
        };
        let gone = dir.path().join("gone.sock");
        store.create(&mut foreground("old", &gone)).unwrap().keep();
        store
            .create(&mut foreground("alive", dir.path()))
            .unwrap()
            .keep();
        store.create(&mut record("detached")).unwrap().keep();
        let ids: Vec<String> = store.records().into_iter().map(|r| r.id).collect();
        assert!(!ids.contains(&"old".to_owned()), "{ids:?}");
        assert_eq!(ids.len(), 2);
    }

    #[test]
    fn a_name_is_given_once_per_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let store = PodStore::at(&dir.path().join("run"), &dir.path().join("cache"));
        let named = |id: &str, address: &str| PodRecord {
            name: Some("web".to_owned()),
            address: address.into(),
            ..record(id)
        };
        let _first = store.create(&mut named("p1", "/a")).unwrap();
        let error = store.create(&mut named("p2", "/a")).unwrap_err();
        assert!(error.what.contains("taken by pod p1"), "{}", error.what);
        let _other = store.create(&mut named("p3", "/b")).unwrap();
        let _unnamed = store.create(&mut record("p4")).unwrap();
        let _unnamed = store.create(&mut record("p5")).unwrap();
    }

    #[test]
    fn pods_are_chosen_by_name_id_or_prefix() {
        let pods = [("abc1", Some("web")), ("abd2", None), ("web2", Some("abc"))];
        let pick = |wanted: &str| choose(wanted, &pods, |p| p.0, |p| p.1).map(|p| p.0);
        assert_eq!(pick("web").unwrap(), "abc1");
        assert_eq!(pick("abd2").unwrap(), "abd2");
        assert_eq!(pick("abd").unwrap(), "abd2");
        // An exact name wins over a prefix.
        assert_eq!(pick("abc").unwrap(), "web2");
        assert!(pick("ab").unwrap_err().what.contains("several"));
        for none in ["", "x"] {
            assert!(pick(none).unwrap_err().what.starts_with("no pod is called"));
        }
    }
}
