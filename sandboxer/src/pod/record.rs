//! What is kept of a pod on disk: `<dir>/<pod>/sandbox.json`.
//!
//! The record says whose a folder is, so that the next daemon can clean up after one that
//! died. It is replaced as a whole (written aside, synced, renamed), so a reader sees the
//! old or the new one and nothing in between.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use external_hv::quark::Sandbox;
use external_hv::supervisor::Supervisor;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::error::{PodError, Result};
use super::storage;

/// Version of the record's format.
const VERSION: u32 = 1;

/// Name of the record in the pod's folder.
const FILE: &str = "sandbox.json";

/// Prefix of folders that are kept because nobody knows what they hold; no id has it.
const QUARANTINE: char = '~';

/// What is known of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Format of the rest.
    pub version: u32,
    /// The pod.
    pub id: String,
    /// The daemon whose threads run it.
    pub daemon_pid: u32,
    /// Nanoseconds since the epoch.
    pub created_at_ns: u64,
    /// The pod's network namespace; empty: none.
    pub netns_path: String,
    /// Host cgroup that CRI wants the pod to be counted in.
    pub cgroup_parent: String,
}

impl Record {
    /// A record of this format.
    #[must_use]
    pub fn new(id: &str, created_at_ns: u64, netns_path: &str, cgroup_parent: &str) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            daemon_pid: std::process::id(),
            created_at_ns,
            netns_path: netns_path.to_owned(),
            cgroup_parent: cgroup_parent.to_owned(),
        }
    }

    /// Writes the record into the pod's folder. Blocks.
    ///
    /// # Errors
    /// The folder cannot be written; an older record is left as it was.
    pub fn write(&self, pod_dir: &Path) -> Result<()> {
        let path = pod_dir.join(FILE);
        let failed = || format!("writing {}", path.display());
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| PodError::io(failed())(std::io::Error::from(e)))?;
        replace(&path, &text).map_err(PodError::io(failed()))
    }

    /// Reads the record of a pod's folder. Blocks.
    pub(super) fn read(pod_dir: &Path) -> std::io::Result<Self> {
        let text = fs::read(pod_dir.join(FILE))?;
        let record: Self = serde_json::from_slice(&text)?;
        if record.version != VERSION {
            return Err(std::io::Error::new(
                ErrorKind::Unsupported,
                format!(
                    "its record has version {}, this daemon knows {VERSION}",
                    record.version
                ),
            ));
        }
        Ok(record)
    }
}

/// Writes `text` aside, syncs it and gives it the name `path`. Blocks.
pub(super) fn replace(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let aside = path.with_extension("json.new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    path.parent()
        .map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Cleans up what a daemon that died left in `dir`: mounts, sockets and folders of pods.
/// The caller holds the lock of `dir`, so no living daemon owns any of it but the pods
/// `known`, which it has taken over. What this daemon
/// cannot read is kept under another name. Blocks.
///
/// # Errors
/// `dir` cannot be listed; trouble with one pod is only logged.
pub fn clean_stale(dir: &Path, known: &[String]) -> Result<()> {
    let failed = || format!("listing {}", dir.display());
    for entry in fs::read_dir(dir).map_err(PodError::io(failed()))? {
        let entry = entry.map_err(PodError::io(failed()))?;
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_dir && !name.starts_with(QUARANTINE) && !known.contains(&name) {
            end_machine(&entry.path(), &name);
            clean_one(&entry.path(), &name);
        }
    }
    Ok(())
}

/// Ends the processes of a machine that nobody has taken over.
fn end_machine(pod_dir: &Path, name: &str) {
    let unknown = |e| warn!(pod = name, "cannot look for its machine: {e}");
    let ending = || warn!(pod = name, "ending a machine that nobody takes over");
    if let Some(supervisor) = Supervisor::find(pod_dir).unwrap_or_else(|e| {
        unknown(e);
        None
    }) {
        ending();
        supervisor.kill();
        supervisor.wait_blocking();
    }
    if let Some(sandbox) = Sandbox::find(pod_dir).unwrap_or_else(|e| {
        unknown(e);
        None
    }) {
        ending();
        sandbox.process().kill();
        sandbox.process().wait_blocking();
    }
}

fn clean_one(pod_dir: &Path, name: &str) {
    if let Err(e) = storage::detach_below(pod_dir) {
        warn!(pod = name, "cannot detach the mounts of a stale pod: {e}");
        return;
    }
    let removed = match Record::read(pod_dir) {
        Ok(record) => {
            info!(
                pod = name,
                daemon = record.daemon_pid,
                "removing a stale pod"
            );
            storage::remove_tree(pod_dir)
        }
        // The daemon died before the record was written: the folder holds nothing yet.
        Err(e) if e.kind() == ErrorKind::NotFound => storage::remove_tree(pod_dir),
        Err(e) => quarantine(pod_dir, name).map(|kept| {
            warn!(pod = name, "{e}; its folder is kept as {}", kept.display());
        }),
    };
    if let Err(e) = removed {
        warn!(pod = name, "cannot remove a stale pod: {e}");
    }
}

fn quarantine(pod_dir: &Path, name: &str) -> std::io::Result<PathBuf> {
    let now = super::nanoseconds(std::time::SystemTime::now());
    let kept = pod_dir.with_file_name(format!("{QUARANTINE}{name}.{now}"));
    fs::rename(pod_dir, &kept)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new("p1", 7, "/var/run/netns/x", "/kubepods/pod1")
    }

    #[test]
    fn what_is_written_is_read_back_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = record();
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), record);
        record.created_at_ns = 8;
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), record);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_keeps_the_old_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut changed = record();
        changed.write(dir.path()).unwrap();
        // A folder where the new record is to be written makes that fail, even for root.
        fs::create_dir(dir.path().join("sandbox.json.new")).unwrap();
        changed.created_at_ns = 9;
        assert!(changed.write(dir.path()).is_err());
        assert_eq!(Record::read(dir.path()).unwrap(), record());
    }

    #[test]
    fn stale_pods_go_and_unreadable_ones_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let pod = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        record().write(&pod("stale")).unwrap();
        fs::write(pod("stale2").join("task.sock"), "").unwrap();
        fs::write(pod("corrupt").join(FILE), "{\"version\":1").unwrap();
        let newer = serde_json::json!({"version": 99, "id": "x"});
        fs::write(pod("newer").join(FILE), newer.to_string()).unwrap();
        fs::write(dir.path().join("daemon.lock"), "").unwrap();
        clean_stale(dir.path(), &[]).unwrap();
        clean_stale(dir.path(), &[]).unwrap();
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left.len(), 3, "{left:?}");
        assert_eq!(left[0], "daemon.lock");
        assert!(left[1].starts_with("~corrupt."), "{left:?}");
        assert!(left[2].starts_with("~newer."), "{left:?}");
        assert!(dir.path().join(&left[1]).join(FILE).exists());
    }
}
