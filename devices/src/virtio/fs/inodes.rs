//! Files and directories that the guest remembers.
//!
//! Each has an `O_PATH` descriptor, which names the file without giving access to it and
//! keeps its inode number from being used again. The guest says how often it has learnt of
//! a file and how often it has forgotten it; at zero nothing of it stays here.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use fuse_backend_rs::api::filesystem::ROOT_ID;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};

use super::names::errno;

/// What makes a file one and the same. The mount counts: a directory mounted in two places
/// has two parents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    number: u64,
}

impl Key {
    fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            number: stat.stx_ino,
        }
    }
}

/// A file that the guest knows.
#[derive(Debug)]
pub struct Inode {
    fd: OwnedFd,
    key: Key,
    file_type: FileType,
}

impl Inode {
    fn new(fd: OwnedFd, stat: &Statx) -> Self {
        Self {
            fd,
            key: Key::of(stat),
            file_type: FileType::from_raw_mode(stat.stx_mode.into()),
        }
    }

    /// Its attributes now.
    ///
    /// # Errors
    /// As statx(2).
    pub fn stat(&self) -> io::Result<Statx> {
        stat(self.fd.as_fd())
    }

    /// What kind of file it is.
    pub fn file_type(&self) -> FileType {
        self.file_type
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.file_type == FileType::Directory
    }

    /// Whether `stat` is of this file.
    pub fn is(&self, stat: &Statx) -> bool {
        self.key == Key::of(stat)
    }

    /// Whether it may be opened for I/O: regular files and directories only.
    ///
    /// # Errors
    /// What the guest is told when it may not.
    pub fn check_openable(&self) -> io::Result<()> {
        match self.file_type {
            FileType::RegularFile | FileType::Directory => Ok(()),
            FileType::Symlink => Err(errno(libc::ELOOP)),
            // The guest kernel opens these by itself and never asks.
            _ => Err(errno(libc::EACCES)),
        }
    }

    /// The name of this file below `/proc/self/fd`.
    pub fn proc_name(&self) -> String {
        self.fd.as_raw_fd().to_string()
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Attributes of the file behind an fd of any kind, its mount included.
///
/// # Errors
/// As statx(2).
pub fn stat(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    Ok(statx(
        fd,
        c"",
        flags,
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    )?)
}

#[derive(Debug, Default)]
struct Table {
    /// With the number of times the guest has learnt of it. There is no file where one was
    /// lost between a snapshot and its restore.
    by_id: HashMap<u64, (Option<Arc<Inode>>, u64)>,
    by_key: HashMap<Key, u64>,
}

/// All files that the guest knows, by the number it knows them by.
#[derive(Debug)]
pub struct Inodes {
    table: RwLock<Table>,
    /// Numbers are not used twice.
    next: AtomicU64,
    limit: usize,
}

impl Inodes {
    /// Knows `root` only, which is never forgotten; up to `limit` others.
    ///
    /// # Errors
    /// As statx(2).
    pub fn new(root: OwnedFd, limit: usize) -> io::Result<Self> {
        let inodes = Self {
            table: RwLock::default(),
            next: AtomicU64::new(ROOT_ID),
            limit: limit.saturating_add(1),
        };
        let stat = stat(root.as_fd())?;
        inodes.learn(root, &stat)?;
        Ok(inodes)
    }

    /// The file with the number `id`.
    ///
    /// # Errors
    /// ESTALE when the guest has forgotten it, or never knew it, or it was lost.
    pub fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table
            .by_id
            .get(&id)
            .and_then(|(inode, _)| inode.clone())
            .ok_or_else(|| errno(libc::ESTALE))
    }

    /// The guest learns of the file behind `fd` (once more); returns its number.
    ///
    /// # Errors
    /// ENFILE when it knows too many.
    pub fn learn(&self, fd: OwnedFd, stat: &Statx) -> io::Result<u64> {
        let key = Key::of(stat);
        let table = &mut *self.write();
        let vacant = match table.by_key.entry(key) {
            MapEntry::Occupied(known) => {
                let id = *known.get();
                if let Some((_, count)) = table.by_id.get_mut(&id) {
                    *count = count.saturating_add(1);
                }
                return Ok(id);
            }
            MapEntry::Vacant(vacant) => vacant,
        };
        if table.by_id.len() >= self.limit {
            return Err(errno(libc::ENFILE));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        vacant.insert(id);
        let inode = Arc::new(Inode::new(fd, stat));
        table.by_id.insert(id, (Some(inode), 1));
        Ok(id)
    }

    /// All but the root, by number, with how often the guest has learnt of each.
    pub fn all(&self) -> Vec<(u64, Option<Arc<Inode>>, u64)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = table
            .by_id
            .iter()
            .filter(|(id, _)| **id != ROOT_ID)
            .map(|(id, (inode, count))| (*id, inode.clone(), *count))
            .collect();
        all.sort_unstable_by_key(|(id, ..)| *id);
        all
    }

    /// Puts a file back under its number, or its loss.
    pub fn put(&self, id: u64, found: Option<(OwnedFd, Statx)>, count: u64) {
        let table = &mut *self.write();
        let inode = found.map(|(fd, stat)| {
            let inode = Inode::new(fd, &stat);
            // Two that the guest knows may have become one: it learns of the first again.
            table.by_key.entry(inode.key).or_insert(id);
            Arc::new(inode)
        });
        table.by_id.insert(id, (inode, count));
    }

    /// The number of the next file.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Numbers files from `next` on.
    pub fn go_on_at(&self, next: u64) {
        self.next.store(next, Ordering::Relaxed);
    }

    /// The guest takes back `count` times of learning of `id`.
    pub fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let table = &mut *self.write();
        let MapEntry::Occupied(mut known) = table.by_id.entry(id) else {
            return;
        };
        let (_, times) = known.get_mut();
        *times = times.saturating_sub(count);
        if *times == 0 {
            let (inode, _) = known.remove();
            if let Some(inode) = inode
                && table.by_key.get(&inode.key) == Some(&id)
            {
                table.by_key.remove(&inode.key);
            }
        }
    }

    /// Makes `root` the root, unless the guest knows other files.
    ///
    /// # Errors
    /// EBUSY when it does; as statx(2).
    pub fn replace_root(&self, root: OwnedFd) -> io::Result<()> {
        let stat = stat(root.as_fd())?;
        let table = &mut *self.write();
        if table.by_id.len() > 1 {
            return Err(errno(libc::EBUSY));
        }
        let inode = Inode::new(root, &stat);
        table.by_key = HashMap::from([(inode.key, ROOT_ID)]);
        table.by_id.insert(ROOT_ID, (Some(Arc::new(inode)), 1));
        Ok(())
    }

    /// Forgets everything but the root.
    pub fn clear(&self) {
        let table = &mut *self.write();
        table.by_id.retain(|&id, _| id == ROOT_ID);
        table.by_key.retain(|_, id| *id == ROOT_ID);
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn learn(inodes: &Inodes, path: &std::path::Path) -> io::Result<u64> {
        let fd = OwnedFd::from(File::open(path).unwrap());
        let stat = stat(fd.as_fd()).unwrap();
        inodes.learn(fd, &stat)
    }

    #[test]
    fn files_are_counted_and_forgotten_without_trace() {
        let dir = tempfile::tempdir().unwrap();
        let root = OwnedFd::from(File::open(dir.path()).unwrap());
        let inodes = Inodes::new(root, 2).unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let (a, b, c) = (path("a"), path("b"), path("c"));
        let first = learn(&inodes, &a).unwrap();
        assert_eq!(learn(&inodes, &a).unwrap(), first);
        let second = learn(&inodes, &b).unwrap();
        assert_ne!(first, second);
        // The limit is the guest's error, and does not count files twice.
        let err = learn(&inodes, &c).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::ENFILE));
        inodes.forget(first, 1);
        inodes.get(first).unwrap();
        inodes.forget(first, u64::MAX);
        let err = inodes.get(first).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::ESTALE));
        // There is room again, and the number is a new one.
        let third = learn(&inodes, &a).unwrap();
        assert!(third > second);
        inodes.forget(ROOT_ID, u64::MAX);
        inodes.forget(12345, 1);
        inodes.clear();
        inodes.get(ROOT_ID).unwrap();
        let table = inodes.write();
        assert_eq!((table.by_id.len(), table.by_key.len()), (1, 1));
    }
}
