//! A share's session, out of its tables and into fresh ones.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_backend_rs::api::filesystem::ROOT_ID;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Statx};

use super::inodes::{Inode, stat};
use super::share::{PATH_FLAGS, Share};
use super::state::{Place, SavedHandle, SavedInode, Session};

/// Of the flags of an open file, those that it is opened with again.
const KEPT_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC);

/// Nothing of a path may lead out of the share, or around in it.
const STRICTLY_BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

impl Share {
    /// What the guest remembers and has open. No request may be in progress.
    ///
    /// # Errors
    /// When this process lacks something to look the files up.
    pub fn save(&self) -> io::Result<Session> {
        let root = self.lookup_root()?;
        let root_path = self.host_path(root.as_fd())?;
        let mut inodes = Vec::new();
        for (id, inode, count) in self.inodes.all() {
            let place = match inode {
                Some(inode) => or_none(self.place(&root, &root_path, &inode))?.flatten(),
                None => None,
            };
            inodes.push(SavedInode { id, count, place });
        }
        let mut handles = Vec::new();
        for (id, handle) in self.handles.all() {
            handles.push(SavedHandle {
                id,
                inode: handle.inode(),
                flags: rustix::fs::fcntl_getfl(handle.file())?.bits(),
            });
        }
        let window = self.window.as_ref();
        Ok(Session {
            writeback: self.writeback.load(Ordering::Relaxed),
            next_inode: self.inodes.next(),
            next_handle: self.handles.next(),
            inodes,
            handles,
            mappings: window.map_or_else(Vec::new, |window| window.all()),
        })
    }

    /// Takes a session into this fresh share. Files that are not there any more, or are of
    /// another type, are stale to the guest, and what it had open of them is closed.
    ///
    /// # Errors
    /// When this process lacks fds or memory for the files.
    pub fn restore(&self, session: &Session) -> io::Result<()> {
        let root = self.lookup_root()?;
        for saved in &session.inodes {
            let found = match &saved.place {
                Some(place) => or_none(find(&root, place))?.flatten(),
                None => None,
            };
            if let Some((_, stat)) = &found {
                // In the order in which the guest has learnt of them.
                self.devices.number(stat, 0);
            } else {
                tracing::debug!(inode = saved.id, "a file of the share is stale");
            }
            self.inodes.put(saved.id, found, saved.count);
        }
        for saved in &session.handles {
            let Ok(inode) = self.inodes.get(saved.inode) else {
                continue;
            };
            let mut flags = OFlags::from_bits_retain(saved.flags) & KEPT_FLAGS;
            if inode.is_directory() {
                flags = OFlags::RDONLY | OFlags::DIRECTORY;
            } else if self.policy.read_only && flags & OFlags::ACCMODE != OFlags::RDONLY {
                continue;
            }
            if let Some(file) = or_none(self.reopen(&inode, flags))? {
                self.handles.put(saved.id, saved.inode, file);
            } else {
                tracing::debug!(inode = saved.inode, "an open file of the share is lost");
            }
        }
        for (at, block) in &session.mappings {
            if or_none(self.map_again(*at, *block))?.is_none() {
                // A guest that still uses it will end; most keep what they have read for
                // when they read it again.
                tracing::debug!(inode = block.inode, "a mapped file of the share is lost");
            }
        }
        self.inodes.go_on_at(session.next_inode);
        self.handles.go_on_at(session.next_handle);
        self.writeback.store(session.writeback, Ordering::Relaxed);
        Ok(())
    }

    /// The root, if names below it can be looked up at all.
    fn lookup_root(&self) -> io::Result<Arc<Inode>> {
        let root = self.inodes.get(ROOT_ID)?;
        open_beneath(&root, Path::new("."))?;
        Ok(root)
    }

    /// Where `inode` is now, if it has a name below the root that leads to it.
    fn place(&self, root: &Inode, root_path: &Path, inode: &Inode) -> io::Result<Option<Place>> {
        let path = self.host_path(inode.as_fd())?;
        // The kernel marks names that are gone, but a file may also be called like that:
        // what counts is where the name leads.
        let Ok(path) = path.strip_prefix(root_path) else {
            return Ok(None);
        };
        let there = stat(open_beneath(root, path)?.as_fd())?;
        Ok(inode.is(&there).then(|| Place {
            path: path.as_os_str().as_bytes().to_vec(),
            file_type: inode.file_type().as_raw_mode(),
        }))
    }

    fn host_path(&self, fd: BorrowedFd<'_>) -> io::Result<PathBuf> {
        let link = fd.as_raw_fd().to_string();
        let path = rustix::fs::readlinkat(&self.proc_fds, link, Vec::new())?;
        Ok(std::ffi::OsString::from_vec(path.into_bytes()).into())
    }
}

/// The file at `place`, unless it is of another type now.
fn find(root: &Inode, place: &Place) -> io::Result<Option<(OwnedFd, Statx)>> {
    let fd = open_beneath(root, Path::new(OsStr::from_bytes(&place.path)))?;
    let stat = stat(fd.as_fd())?;
    let same =
        FileType::from_raw_mode(stat.stx_mode.into()) == FileType::from_raw_mode(place.file_type);
    Ok(same.then_some((fd, stat)))
}

fn open_beneath(root: &Inode, path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat2(
        root,
        path,
        PATH_FLAGS,
        Mode::empty(),
        STRICTLY_BENEATH,
    )?)
}

/// `None` where a file is to blame, an error where this process is.
fn or_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(err)
            if matches!(
                err.raw_os_error(),
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
            ) =>
        {
            Err(err)
        }
        Err(_) => Ok(None),
    }
}
