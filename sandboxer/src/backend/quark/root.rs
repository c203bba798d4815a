//! The folder that a sandbox has as its root, `sandbox` in the pod's: a folder for each
//! container, with `config.json`, `rootfs` and the fifos of its processes.
//!
//! What is mounted in it appears in the sandbox, whose mount namespace is a copy of ours. The
//! sandbox can write to it, so it is only reached through descriptors, never through a link.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use serde_json::Value;
use tracing::warn;

use super::spec::Bind;
use crate::backend::place;
use crate::image::RootDir;
use crate::pod::storage::{ROOTFS, remove_tree};
use crate::pod::{PodError, Result};

/// Names in the pod's folder.
const ROOT: &str = "sandbox";
const SHM: &str = "shm";
/// The spec of a container, or of the sandbox itself.
const CONFIG: &str = "config.json";
/// As large as `/dev/shm` is elsewhere.
const SHM_OPTIONS: &str = "mode=1777,size=64m";

/// See the module. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    /// Memory that containers of the pod's IPC namespace share.
    shm: PathBuf,
}

impl Root {
    /// Makes it, with the sandbox's `config`. Blocks.
    pub(super) fn create(pod_dir: &Path, config: &Value) -> Result<Self> {
        let root = Self::adopt(pod_dir);
        let failed = || PodError::io(format!("making {}", root.path.display()));
        root.make(config).map_err(failed())?;
        Ok(root)
    }

    /// Owns what an earlier daemon made in the pod's folder.
    pub(super) fn adopt(pod_dir: &Path) -> Self {
        Self {
            path: pod_dir.join(ROOT),
            shm: pod_dir.join(SHM),
        }
    }

    fn make(&self, config: &Value) -> io::Result<()> {
        let none = None::<&str>;
        fs::create_dir(&self.path)?;
        mount(Some(&self.path), &self.path, none, MsFlags::MS_BIND, none)?;
        // Seen in the sandbox, and nowhere else.
        for kind in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
            mount(none, &self.path, none, kind, none)?;
        }
        // Of the sandbox itself, which runs nothing in it.
        fs::create_dir_all(self.path.join(ROOTFS).join("dev"))?;
        fs::write(self.path.join(CONFIG), config.to_string())?;
        fs::create_dir(&self.shm)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let options = Some(SHM_OPTIONS);
        mount(Some("tmpfs"), &self.shm, Some("tmpfs"), flags, options)?;
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the shared memory is on the host.
    pub(super) fn shm(&self) -> &Path {
        &self.shm
    }

    /// Ids of the containers that were added. Blocks.
    pub(super) fn containers(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.path().join(CONFIG).is_file())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Makes the folder of a container whose root file system is `rootfs` on the host. Blocks.
    pub(super) fn add(&self, id: &str, spec: &Value, rootfs: &Path, binds: &[Bind]) -> Result<()> {
        let failed = |what: &str| PodError::io(format!("{what} of container {id} for Quark"));
        let top = RootDir::open(&self.path).and_then(|root| root.mount_point(Path::new(""), true));
        let top = top.map_err(failed("making the folder"))?;
        match mkdirat(&top, id, Mode::from_raw_mode(0o755)) {
            Err(rustix::io::Errno::EXIST) => {
                return Err(PodError::invalid(
                    "id",
                    id,
                    "is taken by Quark itself: use another",
                ));
            }
            made => made.map_err(|e| failed("making the folder")(e.into()))?,
        }
        let filled = self.fill(id, spec, rootfs, binds);
        if filled.is_err() {
            self.remove(id);
        }
        filled
    }

    fn fill(&self, id: &str, spec: &Value, rootfs: &Path, binds: &[Bind]) -> Result<()> {
        let failed = |what: &str| PodError::io(format!("{what} of container {id} for Quark"));
        for bind in binds {
            let target = place::target(rootfs, &bind.destination, bind.source.is_dir());
            target
                .and_then(|target| {
                    place::bind(&bind.source, &place::path_of(&target), bind.read_only)
                })
                .map_err(PodError::io(format!(
                    "mounting {} on {} of container {id}",
                    bind.source.display(),
                    bind.destination
                )))?;
        }
        let folder = self.folder(id).map_err(failed("opening the folder"))?;
        let mounted = mkdirat(&folder, ROOTFS, Mode::from_raw_mode(0o755))
            .map_err(io::Error::from)
            .and_then(|()| child(&folder, ROOTFS))
            .and_then(|target| place::bind(rootfs, &place::path_of(&target), false));
        mounted.map_err(failed("mounting the root file system"))?;
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&folder, CONFIG, create, Mode::from_raw_mode(0o600))
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).write_all(spec.to_string().as_bytes()))
            .map_err(failed("writing config.json"))
    }

    /// The folder of a container. Blocks.
    pub(super) fn folder(&self, id: &str) -> io::Result<OwnedFd> {
        child(
            &RootDir::open(&self.path)?.mount_point(Path::new(""), true)?,
            id,
        )
    }

    /// Removes a container. Blocks.
    pub(super) fn remove(&self, id: &str) {
        let removed = self.folder(id).and_then(|folder| {
            detach(&place::path_of(&folder).join(ROOTFS));
            let path = fs::read_link(place::path_of(&folder))?;
            remove_tree(&path)
        });
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                warn!(container = id, "cannot remove its folder: {e}");
            }
            _ => {}
        }
    }

    /// Removes everything; nothing uses it any more. Idempotent. Blocks.
    pub(super) fn release(&self) {
        for path in [&self.path, &self.shm] {
            detach(path);
            if let Err(e) = remove_tree(path) {
                warn!("cannot remove {}: {e}", path.display());
            }
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.release();
    }
}

/// Opens a folder by its name, which is no link.
fn child(folder: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, OsString::from(name), flags, Mode::empty())?)
}

/// Takes away what is mounted on `path`, with all below it.
fn detach(path: &Path) {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    while umount2(path, flags).is_ok() {}
}
