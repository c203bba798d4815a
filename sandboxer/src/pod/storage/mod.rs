//! A container's files as the guest sees them: host mounts under the pod's share.
//!
//! `<dir>/<pod>/shared` is exported by virtio-fs and appears in the guest as
//! [`agent_api::SHARE_DIR`]. A container has a folder of its own there:
//! `<container>/rootfs` holds its root file system and `<container>/mounts/<n>` one bind
//! each. All of it goes away with the [`ContainerStorage`].

mod dir;
mod mount;
mod options;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::MsFlags;
use serde::{Deserialize, Serialize};
use tracing::warn;

pub(crate) use mount::{detach_below, mount_points_below};

use self::dir::Dir;
use self::mount::{MountGuard, Target};
use self::options::MountOptions;
use super::error::{PodError, Result};

/// Name of a container's root file system in its folder.
pub(crate) const ROOTFS: &str = "rootfs";

/// Name of the folder that holds a container's binds.
pub(crate) const MOUNTS: &str = "mounts";

/// A mount as containerd's snapshotters describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsMount {
    /// `bind`, `overlay`, `ext4`, ...
    pub fstype: String,
    /// Folder, device or file.
    pub source: String,
    /// Path inside the root file system; empty for the root itself.
    pub target: String,
    /// As for `mount(8)`.
    pub options: Vec<String>,
}

/// A file or folder of the host that a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// Entry of the container's `mounts` folder.
    pub name: String,
    /// As in the OCI spec.
    pub options: Vec<String>,
}

/// What a container's files are made of, enough to mount them again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// What makes up its root file system.
    pub rootfs: Vec<RootfsMount>,
    /// What else it sees of the host.
    pub binds: Vec<Bind>,
}

/// Everything mounted on the host for one container; dropping it undoes it.
#[derive(Debug)]
pub struct ContainerStorage {
    mounts: Vec<MountGuard>,
    folder: PathBuf,
    recipe: Recipe,
}

impl ContainerStorage {
    /// Mounts what `recipe` lists in a new folder `container` of `share`. Blocks.
    ///
    /// # Errors
    /// Names the mount that failed; everything done before is undone.
    pub fn prepare(share: &Path, container: &str, recipe: Recipe) -> Result<Self> {
        let folder = share.join(container);
        let creating = || format!("creating {}", folder.display());
        let share = Dir::open(share).map_err(PodError::io(creating()))?;
        let top = share
            .create_dir(container)
            .map_err(PodError::io(creating()))?;
        let mut storage = Self {
            mounts: Vec::new(),
            folder: folder.clone(),
            recipe: Recipe::default(),
        };
        let top = Arc::new(top);
        storage.mount_rootfs(&top, &recipe.rootfs)?;
        let mounts = top.create_dir(MOUNTS).map_err(PodError::io(creating()))?;
        let mounts = Arc::new(mounts);
        for bind in &recipe.binds {
            storage.bind(&mounts, bind)?;
        }
        storage.recipe = recipe;
        Ok(storage)
    }

    /// Owns what an earlier daemon mounted for `container`. Blocks.
    ///
    /// # Errors
    /// Its folder is gone.
    pub fn adopt(share: &Path, container: &str, recipe: Recipe) -> Result<Self> {
        let folder = share.join(container);
        let failed = || PodError::io(format!("opening {}", folder.display()));
        let top = Dir::open(share).and_then(|share| share.open_dir(container));
        let top = Arc::new(top.map_err(failed())?);
        let mounts = Arc::new(top.open_dir(MOUNTS).map_err(failed())?);
        let rootfs = recipe
            .rootfs
            .iter()
            .map(|_| MountGuard::adopt(&top, ROOTFS));
        let binds = recipe.binds.iter();
        let binds = binds.map(|bind| MountGuard::adopt(&mounts, &bind.name));
        Ok(Self {
            mounts: rootfs.chain(binds).collect(),
            folder,
            recipe,
        })
    }

    /// What was mounted.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn mount_rootfs(&mut self, top: &Arc<Dir>, rootfs: &[RootfsMount]) -> Result<()> {
        let target = top
            .create_dir(ROOTFS)
            .map(Target::Dir)
            .map_err(PodError::io("creating the rootfs folder"))?;
        for layer in rootfs {
            if !layer.target.is_empty() && layer.target != "/" {
                return Err(PodError::Unsupported(format!(
                    "a rootfs mount with a target ({:?})",
                    layer.target
                )));
            }
            let options = MountOptions::parse(&layer.options);
            let is_bind =
                layer.fstype == "bind" || layer.options.iter().any(|o| o == "bind" || o == "rbind");
            let mounted = if is_bind {
                mount::bind(Path::new(&layer.source), top, ROOTFS, &target, &options)
            } else {
                let fstype = layer.fstype.as_str();
                mount::filesystem(fstype, &layer.source, top, ROOTFS, &target, &options)
            };
            self.mounts.push(mounted.map_err(PodError::io(format!(
                "mounting the rootfs ({} from {})",
                layer.fstype, layer.source
            )))?);
        }
        Ok(())
    }

    fn bind(&mut self, mounts: &Arc<Dir>, bind: &Bind) -> Result<()> {
        let mut options = MountOptions::parse(&bind.options);
        if !options.data.is_empty() {
            warn!(source = %bind.source.display(), "bind options {:?} ignored", options.data);
        }
        // The guest applies atime flags itself; the host's mount needs none of them.
        options.flags &= MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let failed = || format!("sharing {} with the guest", bind.source.display());
        let target =
            mount::target_like(mounts, &bind.name, &bind.source).map_err(PodError::io(failed()))?;
        let guard = mount::bind(&bind.source, mounts, &bind.name, &target, &options)
            .map_err(PodError::io(failed()))?;
        self.mounts.push(guard);
        Ok(())
    }
}

impl Drop for ContainerStorage {
    fn drop(&mut self) {
        while self.mounts.pop().is_some() {}
        if let Err(e) = remove_tree(&self.folder) {
            warn!("cannot remove {}: {e}", self.folder.display());
        }
    }
}

/// Removes `folder` with everything in it, unless something is still mounted there, so that
/// no file of a container's image or volume is ever deleted.
pub(crate) fn remove_tree(folder: &Path) -> std::io::Result<()> {
    let mounted = mount_points_below(folder)?;
    if let Some(point) = mounted.first() {
        return Err(std::io::Error::other(format!(
            "{} is still mounted",
            point.display()
        )));
    }
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The folder a pod exports to its guest, as a private mount: nothing mounted below it
/// shows up in other mount namespaces and keeps image snapshots busy there.
#[derive(Debug)]
pub(crate) struct Share {
    path: PathBuf,
    mount: Option<MountGuard>,
}

impl Share {
    /// Creates `shared` in the pod's folder. Blocks.
    pub(crate) fn create(pod_dir: &Path) -> Result<Self> {
        const NAME: &str = "shared";
        let path = pod_dir.join(NAME);
        let failed = || format!("creating {}", path.display());
        let parent = Dir::open(pod_dir).map_err(PodError::io(failed()))?;
        let target = parent
            .create_dir(NAME)
            .map(Target::Dir)
            .map_err(PodError::io(failed()))?;
        let options = MountOptions::parse::<&str>(&[]);
        let mount = mount::bind(&path, &Arc::new(parent), NAME, &target, &options)
            .map_err(PodError::io(format!("mounting {}", path.display())))?;
        Ok(Self {
            path,
            mount: Some(mount),
        })
    }

    /// Owns the share that an earlier daemon made in the pod's folder. Blocks.
    pub(crate) fn adopt(pod_dir: &Path) -> Result<Self> {
        const NAME: &str = "shared";
        let path = pod_dir.join(NAME);
        let parent =
            Dir::open(pod_dir).map_err(PodError::io(format!("opening {}", pod_dir.display())))?;
        Ok(Self {
            path,
            mount: Some(MountGuard::adopt(&Arc::new(parent), NAME)),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        drop(self.mount.take());
        if let Err(e) = remove_tree(&self.path) {
            warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}
