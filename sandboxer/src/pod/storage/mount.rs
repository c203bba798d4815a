//! Mounts with an owner.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use tracing::warn;

use super::dir::{Dir, fd_path};
use super::options::MountOptions;

/// A mount on the entry `name` of a folder; dropping it detaches it and all below it.
#[derive(Debug)]
pub(super) struct MountGuard {
    parent: Arc<Dir>,
    name: String,
}

impl MountGuard {
    /// Owns what an earlier daemon mounted on the entry `name` of `parent`.
    pub(super) fn adopt(parent: &Arc<Dir>, name: &str) -> Self {
        Self {
            parent: Arc::clone(parent),
            name: name.to_owned(),
        }
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        let path = self.parent.entry(&self.name);
        if let Err(e) = umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            warn!("cannot detach the mount on {}: {e}", self.name);
        }
    }
}

/// What is mounted on: a folder or a file made for it.
pub(super) enum Target {
    Dir(Dir),
    File(OwnedFd),
}

impl Target {
    fn path(&self) -> PathBuf {
        match self {
            Self::Dir(dir) => dir.path(),
            Self::File(fd) => fd_path(fd),
        }
    }
}

/// Creates the folder `name` in `parent`, or a file where `source` is none, to mount on.
pub(super) fn target_like(parent: &Dir, name: &str, source: &Path) -> io::Result<Target> {
    if std::fs::metadata(source)?.is_dir() {
        parent.create_dir(name).map(Target::Dir)
    } else {
        parent.create_file(name).map(Target::File)
    }
}

/// Binds `source` on `target`, which is the entry `name` of `parent`.
pub(super) fn bind(
    source: &Path,
    parent: &Arc<Dir>,
    name: &str,
    target: &Target,
    options: &MountOptions,
) -> io::Result<MountGuard> {
    let mut flags = MsFlags::MS_BIND;
    flags.set(MsFlags::MS_REC, options.recursive);
    mount(
        Some(source),
        &target.path(),
        None::<&str>,
        flags,
        None::<&str>,
    )?;
    let guard = MountGuard {
        parent: Arc::clone(parent),
        name: name.to_owned(),
    };
    // `target` still leads to what is under the mount, so go by the name, which the guest
    // cannot move any more now that it is a mount point.
    let mounted = parent.entry(name);
    let propagation = if options.follows_host {
        MsFlags::MS_SLAVE
    } else {
        MsFlags::MS_PRIVATE
    };
    mount(
        None::<&str>,
        &mounted,
        None::<&str>,
        propagation | MsFlags::MS_REC,
        None::<&str>,
    )?;
    if !options.flags.is_empty() {
        let kept = flags_of(&mounted)?;
        mount(
            None::<&str>,
            &mounted,
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND | kept | options.flags,
            None::<&str>,
        )?;
    }
    Ok(guard)
}

/// Mounts a file system of type `fstype` on `target`, the entry `name` of `parent`.
pub(super) fn filesystem(
    fstype: &str,
    source: &str,
    parent: &Arc<Dir>,
    name: &str,
    target: &Target,
    options: &MountOptions,
) -> io::Result<MountGuard> {
    let data = (!options.data.is_empty()).then_some(options.data.as_str());
    mount(
        Some(source),
        &target.path(),
        Some(fstype),
        options.flags,
        data,
    )?;
    Ok(MountGuard {
        parent: Arc::clone(parent),
        name: name.to_owned(),
    })
}

/// Flags a mount has already, which a remount would otherwise clear.
fn flags_of(path: &Path) -> io::Result<MsFlags> {
    let present = statvfs(path)?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    Ok(pairs
        .into_iter()
        .filter(|(have, _)| present.contains(*have))
        .fold(MsFlags::empty(), |flags, (_, flag)| flags | flag))
}

/// Detaches every mount below `root`, deepest first; for what a dead daemon left.
pub(crate) fn detach_below(root: &Path) -> io::Result<()> {
    for point in mount_points_below(root)?.into_iter().rev() {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // A parent taken off earlier took this one along.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Mount points strictly below `root`, in the order they were mounted.
pub(crate) fn mount_points_below(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = procfs::process::Process::myself()
        .and_then(|process| process.mountinfo())
        .map_err(io::Error::other)?;
    Ok(mounts
        .into_iter()
        .map(|m| m.mount_point)
        .filter(|point| point != root && point.starts_with(root))
        .collect())
}
