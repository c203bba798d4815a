//! What PID 1 does to a fresh guest: file systems, devices, cgroups, loopback.
//!
//! Every step costs system calls, and nothing here is worth dying for: what a kernel lacks is
//! reported and skipped.

mod modules;

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};
use tracing::{debug, warn};

use crate::container::{bundle, cgroup, rootfs};
use crate::sandbox::set_sysctl;
use crate::sys;

/// File systems in mounting order: type, target, flags, data, whether the target is on a file
/// system mounted just before and so has to be made.
const MOUNTS: [(&str, &str, MsFlags, &str, bool); 7] = [
    ("proc", "/proc", SAFE, "", false),
    ("sysfs", "/sys", SAFE, "", false),
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755", false),
    (
        "devpts",
        "/dev/pts",
        NOSUID_NOEXEC,
        "mode=620,gid=5,ptmxmode=666",
        true,
    ),
    // The pod's shared memory, as large as Kubernetes makes it.
    (
        "tmpfs",
        "/dev/shm",
        NOSUID_NODEV,
        "mode=1777,size=64m",
        true,
    ),
    ("tmpfs", "/run", NOSUID_NODEV, "mode=755", false),
    ("cgroup2", cgroup::ROOT, SAFE, "", false),
];

/// The most the kernel allows by default, `fs.nr_open`.
const OPEN_FILES: u64 = 1 << 20;

const NOSUID_NOEXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const SAFE: MsFlags = NOSUID_NOEXEC.union(MsFlags::MS_NODEV);

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Kernel settings for a machine that only runs containers: the host bounds memory, so the
/// guest may promise more than it has.
const SYSCTLS: [(&str, &str); 1] = [("vm.overcommit_memory", "1")];

/// Makes the root something that containers can pivot away from.
///
/// The initramfs is the kernel's first mount, which `pivot_root(2)` cannot replace. Binding
/// it over itself makes a second mount of the same files, nothing is copied, and `/..`
/// leads from below into what is mounted on top.
pub fn own_root() -> nix::Result<()> {
    mount(Some("/"), "/", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    chdir("/..")?;
    chroot(".")
}

/// Mounts `/proc`, which the kernel's parameters are read from.
pub fn mount_proc() -> io::Result<()> {
    let [(kind, target, flags, data, _), ..] = MOUNTS;
    mount_at(kind, target, flags, data)
}

/// Prepares the rest. `guest` tells whether kernel-wide settings are ours to change.
pub fn prepare(guest: bool) {
    if guest {
        modules::load();
    }
    for (kind, target, flags, data, make) in MOUNTS.into_iter().skip(1) {
        if make && let Err(e) = fs::create_dir(target) {
            debug!("{target}: {e}");
        }
        if let Err(e) = mount_at(kind, target, flags, data) {
            warn!("{kind} is not mounted on {target}: {e}");
        }
    }
    for dir in [bundle::DIR, rootfs::DIR] {
        if let Err(e) = fs::create_dir_all(dir) {
            warn!("{dir}: {e}");
        }
    }
    match cgroup::enable_controllers() {
        Ok(failed) => failed.iter().for_each(|f| warn!("cgroup controller {f}")),
        Err(e) => warn!("cgroup controllers: {e}"),
    }
    if !guest {
        return;
    }
    // Containers inherit it unless their spec says otherwise.
    if let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES) {
        warn!("limit of open files: {e}");
    }
    for (target, link) in LINKS {
        if let Err(e) = symlink(target, link) {
            debug!("{link}: {e}");
        }
    }
    if let Err(e) = sys::interface_up("lo") {
        warn!("loopback is down: {e}");
    }
    for (key, value) in SYSCTLS {
        if let Err(e) = set_sysctl(key, value) {
            warn!("{e}");
        }
    }
}

/// Mounts a file system that has no device, making its target when it is missing.
fn mount_at(kind: &str, target: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    let attempt = || mount(Some(kind), target, Some(kind), flags, Some(data));
    let mut result = attempt();
    if result == Err(Errno::ENOENT) {
        fs::create_dir_all(Path::new(target))?;
        result = attempt();
    }
    match result {
        // The same file system is there already.
        Err(Errno::EBUSY) => Ok(()),
        other => Ok(other?),
    }
}
