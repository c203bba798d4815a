//! Folders that a guest can write to.
//!
//! The share of a pod is writable by its guest, and a hostile one may put a symbolic link
//! where the daemon is about to create or mount something. Everything below the share is
//! therefore reached through folder handles, one name at a time, never through a link.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};

/// An open folder.
#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
}

impl Dir {
    /// Opens a folder whose parents only the daemon can change.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_PATH;
        let fd = open(path, flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Creates the folder `name`, which must not exist, and opens it.
    pub(super) fn create_dir(&self, name: &str) -> io::Result<Self> {
        mkdirat(self.fd.as_fd(), name, Mode::from_bits_truncate(0o755))?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_PATH;
        let fd = openat(self.fd.as_fd(), name, flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Opens the folder `name`, which is no link.
    pub(super) fn open_dir(&self, name: &str) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_PATH;
        let fd = openat(self.fd.as_fd(), name, flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Creates the empty file `name`, which must not exist, as something to mount on.
    pub(super) fn create_file(&self, name: &str) -> io::Result<OwnedFd> {
        let flags =
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
        Ok(openat(
            self.fd.as_fd(),
            name,
            flags,
            Mode::from_bits_truncate(0o644),
        )?)
    }

    /// A path for `mount(2)` that leads to this very folder.
    pub(super) fn path(&self) -> PathBuf {
        fd_path(&self.fd)
    }

    /// A path for `umount2(2)` to the entry `name`.
    pub(super) fn entry(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// A path that leads to what `fd` has open, whatever its name is by now.
pub(super) fn fd_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
