//! Templates on disk: a folder each, named by its key, complete or not there.
//!
//! A template is written to a folder with another name and renamed when it is on disk, so
//! that a daemon that is killed in between leaves nothing that could be taken for one.
//! Such left-overs are removed by whoever opens the store next, unless their writer lives.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use vmm_core::{Snapshot, SnapshotError};

use super::TemplateKey;

/// What names of unfinished templates begin with.
const UNFINISHED: &str = ".building-";
/// What is known of a template without loading it.
const INFO: &str = "template.json";

/// A template in the store cannot be used, or not be written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The snapshot's own files.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Another file operation.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether there is no such template.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        match self {
            Self::Snapshot(SnapshotError::File { source, .. }) | Self::Io { source, .. } => {
                source.kind() == ErrorKind::NotFound
            }
            Self::Snapshot(_) => false,
        }
    }
}

/// What `kuasar-ctl template ls` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateInfo {
    /// The template's key.
    pub key: String,
    /// vCPUs of its machine.
    pub vcpus: u32,
    /// Memory of its machine.
    pub memory_bytes: u64,
    /// The kernel that it booted.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// When it was built, in seconds since the epoch.
    pub built_at: u64,
    /// How long that took, in milliseconds.
    pub build_ms: u64,
}

/// A template that is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its key.
    pub key: TemplateKey,
    /// What is known of it; `None` when its description is damaged.
    pub info: Option<TemplateInfo>,
    /// What it takes on disk.
    pub disk_bytes: u64,
    /// When it was last loaded or built.
    pub used: SystemTime,
}

/// The folder of templates.
#[derive(Clone, Debug)]
pub struct TemplateStore {
    dir: PathBuf,
}

/// A template being written. Dropping it removes what there is.
#[derive(Debug)]
pub struct Unfinished {
    dir: TempDir,
    // Held while the writer lives.
    _lock: File,
}

impl Unfinished {
    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl TemplateStore {
    /// Opens the store in `dir`, made with mode 0700, and clears what killed builders left.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(StoreError::io("cannot create the folder", dir))?;
        let store = Self {
            dir: dir.to_owned(),
        };
        store.collect_garbage()?;
        Ok(store)
    }

    fn entries(&self) -> Result<fs::ReadDir, StoreError> {
        fs::read_dir(&self.dir).map_err(StoreError::io("cannot read the folder", &self.dir))
    }

    fn collect_garbage(&self) -> Result<(), StoreError> {
        for entry in self.entries()?.flatten() {
            if !entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                continue;
            }
            // Its writer holds the folder locked for as long as it lives.
            let abandoned = File::open(entry.path()).is_ok_and(|dir| {
                rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()
            });
            if abandoned && let Err(err) = fs::remove_dir_all(entry.path()) {
                tracing::warn!("cannot remove {}: {err}", entry.path().display());
            }
        }
        Ok(())
    }

    /// A folder to write a template to.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn begin(&self) -> Result<Unfinished, StoreError> {
        let dir = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.dir)
            .map_err(StoreError::io("cannot create a folder in", &self.dir))?;
        let lock = File::open(dir.path())
            .and_then(|file| {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                Ok(file)
            })
            .map_err(StoreError::io("cannot lock", dir.path()))?;
        Ok(Unfinished { dir, _lock: lock })
    }

    /// Writes a template and makes it complete. One of the same key that another daemon
    /// finished meanwhile stays.
    ///
    /// # Errors
    /// Writing fails; nothing of it is left then.
    pub fn finish(
        &self,
        unfinished: Unfinished,
        key: &TemplateKey,
        snapshot: &Snapshot,
        info: &TemplateInfo,
    ) -> Result<(), StoreError> {
        let from = unfinished.path();
        snapshot.store(from, key.as_str())?;
        let path = from.join(INFO);
        let text = serde_json::to_vec_pretty(info)
            .map_err(|err| StoreError::io("cannot describe", &path)(err.into()))?;
        fs::write(&path, text).map_err(StoreError::io("cannot write", &path))?;
        let to = self.dir.join(key.as_str());
        match fs::rename(from, &to) {
            Ok(()) => {
                // Nothing is left to remove.
                let _ = unfinished.dir.keep();
                File::open(&self.dir)
                    .and_then(|dir| dir.sync_all())
                    .map_err(StoreError::io("cannot sync", &self.dir))
            }
            Err(err)
                if matches!(
                    err.kind(),
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists
                ) =>
            {
                Ok(())
            }
            Err(err) => Err(StoreError::io("cannot rename a template to", &to)(err)),
        }
    }

    /// Loads a template; its files are no longer needed afterwards.
    ///
    /// # Errors
    /// There is none ([`StoreError::is_missing`]), or it is damaged.
    pub fn load(&self, key: &TemplateKey) -> Result<Snapshot, StoreError> {
        let dir = self.dir.join(key.as_str());
        let snapshot = Snapshot::load(&dir, key.as_str())?;
        // The folder's own time says when it was last of use; only eviction looks at it.
        let touched = File::open(&dir).and_then(|dir| dir.set_modified(SystemTime::now()));
        if let Err(err) = touched {
            tracing::debug!("cannot note the use of {}: {err}", dir.display());
        }
        Ok(snapshot)
    }

    /// Every complete template, the one used last first.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<Stored>, StoreError> {
        let mut found = Vec::new();
        for entry in self.entries()?.flatten() {
            let name = entry.file_name();
            let Some(key) = name.to_str().and_then(TemplateKey::parse) else {
                continue;
            };
            // One that is being removed has neither.
            let Ok(used) = entry.metadata().and_then(|meta| meta.modified()) else {
                continue;
            };
            let info = fs::read(entry.path().join(INFO))
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok());
            found.push(Stored {
                key,
                info,
                disk_bytes: disk_bytes(&entry.path()),
                used,
            });
        }
        found.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.key.cmp(&b.key)));
        Ok(found)
    }

    /// Removes a template; machines cloned from it go on. Returns whether there was one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, key: &TemplateKey) -> Result<bool, StoreError> {
        let from = self.dir.join(key.as_str());
        // Renamed first: half a template must not have its name.
        let trash = self.begin()?;
        let to = trash.path().join("removed");
        match fs::rename(&from, &to) {
            Ok(()) => Ok(true),
            Err(err) if err.kind() == ErrorKind::NotFound => Ok(false),
            Err(err) => Err(StoreError::io("cannot remove", &from)(err)),
        }
    }

    /// Removes all but the `keep` templates used last, and never `current`.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn evict(&self, keep: usize, current: &TemplateKey) -> Result<(), StoreError> {
        let others = self.list()?;
        let others = others.iter().filter(|stored| stored.key != *current);
        for stored in others.skip(keep.saturating_sub(1)) {
            tracing::info!(template = %stored.key, "evicted");
            self.remove(&stored.key)?;
        }
        Ok(())
    }
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|meta| meta.blocks().saturating_mul(512))
        .sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    fn key(n: u8) -> TemplateKey {
        TemplateKey::parse(&format!("{n:032x}")).unwrap()
    }

    /// A folder that looks like a template, used `age` seconds ago.
    fn plant(store: &TemplateStore, n: u8, age: u64) {
        let dir = store.dir.join(key(n).as_str());
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("state"), "x").unwrap();
        let used = SystemTime::now() - Duration::from_secs(age);
        File::open(&dir).unwrap().set_modified(used).unwrap();
    }

    fn keys(store: &TemplateStore) -> Vec<TemplateKey> {
        let list = store.list().unwrap();
        list.into_iter().map(|stored| stored.key).collect()
    }

    #[test]
    fn the_folder_is_private_and_lists_templates_by_use() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        let store = TemplateStore::open(&dir).unwrap();
        let mode = fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        plant(&store, 1, 100);
        plant(&store, 2, 10);
        plant(&store, 3, 1000);
        fs::create_dir(dir.join("unrelated")).unwrap();
        assert_eq!(keys(&store), [key(2), key(1), key(3)]);
        assert_eq!(store.list().unwrap()[0].info, None);
    }

    #[test]
    fn the_least_used_go_first_and_the_current_one_never() {
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::open(root.path()).unwrap();
        for n in 1..=5 {
            plant(&store, n, u64::from(n) * 10);
        }
        store.evict(3, &key(5)).unwrap();
        assert_eq!(keys(&store), [key(1), key(2), key(5)]);
        store.evict(1, &key(5)).unwrap();
        assert_eq!(keys(&store), [key(5)]);
    }

    #[test]
    fn removing_is_whole_and_idempotent() {
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::open(root.path()).unwrap();
        plant(&store, 1, 0);
        assert!(store.remove(&key(1)).unwrap());
        assert!(!store.remove(&key(1)).unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(store.load(&key(1)).unwrap_err().is_missing());
    }

    #[test]
    fn only_what_dead_builders_left_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::open(root.path()).unwrap();
        let living = store.begin().unwrap();
        let dead = root.path().join(".building-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("memory"), "half").unwrap();
        TemplateStore::open(root.path()).unwrap();
        assert!(!dead.exists());
        assert!(living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists(), "dropped unfinished");
    }

    #[test]
    fn a_damaged_template_is_no_missing_one() {
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::open(root.path()).unwrap();
        plant(&store, 1, 0);
        let err = store.load(&key(1)).unwrap_err();
        assert!(!err.is_missing(), "{err}");
    }
}
