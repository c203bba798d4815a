//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::names::errno;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    inode: u64,
    file: File,
    /// Held while the position of a directory is in use.
    pub position: Mutex<()>,
}

impl Handle {
    fn new(inode: u64, file: File) -> Self {
        Self {
            inode,
            file,
            position: Mutex::new(()),
        }
    }

    /// Number of the file.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Calls `io` with the file as the I/O traits of the FUSE server want it, although
    /// positioned I/O on it needs no exclusive access.
    pub fn with_file<T>(&self, io: impl FnOnce(&mut File) -> T) -> T {
        // SAFETY: the fd is open as long as `self`, which outlives the call, and the alias
        // is never dropped, so the fd has one owner that closes it.
        let mut alias = ManuallyDrop::new(unsafe { File::from_raw_fd(self.file.as_raw_fd()) });
        io(&mut alias)
    }
}

/// All that is open, by the number that the guest uses.
#[derive(Debug)]
pub struct Handles {
    table: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    limit: usize,
}

impl Handles {
    /// None yet, up to `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            table: RwLock::default(),
            next: AtomicU64::new(1),
            limit,
        }
    }

    /// Adds an open file of `inode`; returns its number.
    ///
    /// # Errors
    /// ENFILE when too many are open.
    pub fn add(&self, inode: u64, file: File) -> io::Result<u64> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= self.limit {
            return Err(errno(libc::ENFILE));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        table.insert(id, Arc::new(Handle::new(inode, file)));
        Ok(id)
    }

    /// All, by number.
    pub fn all(&self) -> Vec<(u64, Arc<Handle>)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = table
            .iter()
            .map(|(id, handle)| (*id, Arc::clone(handle)))
            .collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }

    /// Puts an open file of `inode` back under its number.
    pub fn put(&self, id: u64, inode: u64, file: File) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(id, Arc::new(Handle::new(inode, file)));
    }

    /// The number of the next open file.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Numbers open files from `next` on.
    pub fn go_on_at(&self, next: u64) {
        self.next.store(next, Ordering::Relaxed);
    }

    /// The open file `id` of `inode`.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table
            .get(&id)
            .filter(|handle| handle.inode == inode)
            .map(Arc::clone)
            .ok_or_else(|| errno(libc::EBADF))
    }

    /// Closes `id` of `inode`, once nobody uses it any more.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn remove(&self, id: u64, inode: u64) -> io::Result<()> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.get(&id).is_some_and(|handle| handle.inode == inode) {
            table.remove(&id);
            return Ok(());
        }
        Err(errno(libc::EBADF))
    }

    /// Closes everything.
    pub fn clear(&self) {
        self.table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}
