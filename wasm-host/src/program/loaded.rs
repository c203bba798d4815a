//! Programs in memory: found by what they are made of, or by the file they came from.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::OnceCell;

use super::{Digest, Program};

/// Files remembered by their identity.
const MAX_FILES: usize = 1024;

/// Names a file's content without reading it: whatever changes a file changes its times, and
/// nobody can set the time of the last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileId {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A file whose last change is older than this cannot change again without getting other times,
/// however coarse the file system's clock is.
const SETTLED: Duration = Duration::from_secs(1);

/// Whether a [`FileId`] of this file says all about its content.
pub(super) fn is_settled(meta: &Metadata) -> bool {
    let changed = u64::try_from(meta.ctime()).unwrap_or_default();
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .is_ok_and(|now| now > Duration::from_secs(changed) + Duration::from_secs(1) + SETTLED)
}

type Flight = Arc<OnceCell<Arc<Program>>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The newest last.
    kept: Mutex<Vec<Arc<Program>>>,
    keep: usize,
    programs: Mutex<HashMap<Digest, Weak<Program>>>,
    files: Mutex<HashMap<FileId, Weak<Program>>>,
    flights: Mutex<HashMap<Digest, Flight>>,
}

impl Loaded {
    pub(crate) fn new(keep: usize) -> Self {
        Self {
            kept: Mutex::default(),
            keep,
            programs: Mutex::default(),
            files: Mutex::default(),
            flights: Mutex::default(),
        }
    }

    /// Where everybody who wants a program meets while it is made.
    pub(super) fn flight(&self, digest: Digest) -> Flight {
        Arc::clone(lock(&self.flights).entry(digest).or_default())
    }

    pub(super) fn landed(&self, digest: &Digest) {
        lock(&self.flights).remove(digest);
    }

    pub(super) fn by_digest(&self, digest: &Digest) -> Option<Arc<Program>> {
        lock(&self.programs).get(digest)?.upgrade()
    }

    pub(super) fn by_file(&self, id: &FileId) -> Option<Arc<Program>> {
        let program = lock(&self.files).get(id)?.upgrade()?;
        self.touch(&program);
        Some(program)
    }

    pub(super) fn remember(&self, id: FileId, program: &Arc<Program>) {
        let mut files = lock(&self.files);
        if files.len() >= MAX_FILES {
            files.retain(|_, program| program.strong_count() > 0);
        }
        if files.len() >= MAX_FILES {
            files.clear();
        }
        files.insert(id, Arc::downgrade(program));
    }

    /// Keeps a program in memory until `keep` newer ones were used.
    pub(super) fn keep(&self, program: &Arc<Program>) {
        let mut programs = lock(&self.programs);
        programs.retain(|_, program| program.strong_count() > 0);
        programs.insert(program.digest, Arc::downgrade(program));
        drop(programs);
        self.touch(program);
    }

    fn touch(&self, program: &Arc<Program>) {
        let mut kept = lock(&self.kept);
        kept.retain(|other| !Arc::ptr_eq(other, program));
        kept.push(Arc::clone(program));
        let surplus = kept.len().saturating_sub(self.keep);
        let gone: Vec<_> = kept.drain(..surplus).collect();
        drop(kept);
        // Unmaps code: not under the lock.
        drop(gone);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
