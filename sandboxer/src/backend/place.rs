//! Where files of a container are on the host, for pods that share its kernel's mounts.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::image::RootDir;

/// The place on the host of what a guest sees in its share.
pub(super) fn on_host(path: &str, share: &Path) -> Option<PathBuf> {
    let inside = Path::new(path).strip_prefix(agent_api::SHARE_DIR).ok()?;
    Some(share.join(inside))
}

/// Opens the place `destination` of a container's root file system, making it where it is
/// missing, without leaving `root`.
pub(super) fn target(root: &Path, destination: &str, is_dir: bool) -> io::Result<OwnedFd> {
    RootDir::open(root)?.mount_point(Path::new(destination), is_dir)
}

/// A path for `mount(2)` that leads to what `fd` has open.
pub(super) fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Mounts `source`, with all below it, on `target`, a path of an open descriptor.
pub(super) fn bind(source: &Path, target: &Path, read_only: bool) -> io::Result<()> {
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, none, flags, none)?;
    if !read_only {
        return Ok(());
    }
    // The target leads to what is under the mount: the descriptor was opened before. So the
    // mount is found by the path behind it.
    let mounted = std::fs::read_link(target)?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, &mounted, none, flags, none)?;
    Ok(())
}
