//! Makes a container's plain mounts before the runtime does.
//!
//! libcontainer spends about seventy system calls on each mount, most of them on checking
//! again and again that `/proc` is what it seems. The agent needs five: it opens the
//! destination with `openat2(2)`, which cannot leave the root file system, and mounts there
//! in its own mount namespace; the container's is a copy of it. Mounts that need one of the
//! container's namespaces, or options this module does not know, are left to the runtime.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use tracing::{debug, warn};

use crate::error::AgentError;
use crate::mounts::parse_options;

/// Where root file systems are bound, one folder each.
pub const DIR: &str = "/run/kuasar/rootfs";

/// Propagation that a mount in the agent's namespace has anyway.
const PRIVATE: [&str; 4] = ["private", "rprivate", "slave", "rslave"];

/// A container's root file system with its plain mounts, unmounted when dropped.
#[derive(Debug)]
pub struct Rootfs {
    dir: PathBuf,
    mounted: bool,
}

/// A mount the agent can make.
#[derive(Debug, PartialEq, Eq)]
struct Plain {
    source: PathBuf,
    target: PathBuf,
    kind: Option<String>,
    flags: MsFlags,
    data: String,
}

impl Rootfs {
    /// Binds the root file system of `spec`, mounts what is plain and takes it out of `spec`.
    /// `None` when the spec has to be left to the runtime altogether.
    pub fn prepare(container: &str, spec: &mut Spec) -> Result<Option<Self>, AgentError> {
        let Some(source) = spec.root().as_ref().map(|r| r.path().clone()) else {
            return Ok(None);
        };
        if !suits(spec) {
            return Ok(None);
        }
        let dir = Path::new(DIR).join(container);
        fs::create_dir(&dir).map_err(AgentError::io(dir.display().to_string()))?;
        let mut rootfs = Self {
            dir,
            mounted: false,
        };
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&source), &rootfs.dir, None::<&str>, bind, None::<&str>)
            .map_err(|e| AgentError::io(format!("root.path {}", source.display()))(e.into()))?;
        rootfs.mounted = true;
        let root = open(&rootfs.dir)?;
        let mut left: Vec<Mount> = Vec::new();
        for wanted in spec.mounts_mut().take().unwrap_or_default() {
            let target = wanted.destination();
            let tied = left.iter().map(Mount::destination);
            let tied = tied
                .into_iter()
                .any(|l| l.starts_with(target) || target.starts_with(l));
            let made = match plain(&wanted).filter(|_| !tied) {
                Some(plain) => plain.make(&root)?,
                None => false,
            };
            if !made {
                left.push(wanted);
            }
        }
        spec.set_mounts(Some(left));
        if let Some(root) = spec.root_mut() {
            root.set_path(rootfs.dir.clone());
        }
        Ok(Some(rootfs))
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        if self.mounted
            && let Err(e) = umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        {
            warn!("{} stays mounted: {e}", self.dir.display());
            return;
        }
        // Never recursive: what is inside belongs to the container.
        if let Err(e) = fs::remove_dir(&self.dir) {
            warn!("{} stays: {e}", self.dir.display());
        }
    }
}

/// Whether mounts made outside of the container's namespaces are the same inside.
fn suits(spec: &Spec) -> bool {
    let Some(linux) = spec.linux() else {
        return false;
    };
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let own = |kind| namespaces.iter().any(|n| n.typ() == kind);
    linux.rootfs_propagation().is_none()
        && !own(LinuxNamespaceType::User)
        && !own(LinuxNamespaceType::Network)
        && namespaces
            .iter()
            .all(|n| n.typ() != LinuxNamespaceType::Mount || n.path().is_none())
}

/// The mount in a form the agent can make, if it can.
fn plain(wanted: &Mount) -> Option<Plain> {
    if wanted.uid_mappings().is_some() || wanted.gid_mappings().is_some() {
        return None;
    }
    let options = wanted.options().as_deref().unwrap_or_default();
    let options: Vec<String> = options
        .iter()
        .filter(|o| !PRIVATE.contains(&o.as_str()))
        .cloned()
        .collect();
    let (flags, data) = parse_options(&options);
    let kind = wanted.typ().as_deref().unwrap_or_default();
    let bind = flags.contains(MsFlags::MS_BIND);
    // What is left for the file system must look like it.
    let understood = |d: &str| d == "newinstance" || d.contains('=');
    let fits = match kind {
        "tmpfs" | "devpts" | "sysfs" => {
            !bind && data.split(',').filter(|d| !d.is_empty()).all(understood)
        }
        _ => bind && data.is_empty(),
    };
    fits.then(|| Plain {
        source: wanted.source().clone().unwrap_or_else(|| kind.into()),
        target: wanted.destination().clone(),
        kind: Some(kind.to_owned()).filter(|_| !bind),
        flags,
        data,
    })
}

impl Plain {
    /// Mounts it below `root`. `false` leaves it to the runtime, whose error says why, or
    /// which makes the destination.
    fn make(&self, root: &OwnedFd) -> Result<bool, AgentError> {
        let bind = self.flags.contains(MsFlags::MS_BIND);
        let target = match resolve(root, &self.target) {
            Err(Errno::ENOENT) if !bind => make_dir(root, &self.target),
            other => other,
        };
        let attempt = target.and_then(|target| {
            let (kind, data) = (self.kind.as_deref(), self.data.as_str());
            mount(
                Some(&self.source),
                &path_of(&target),
                kind,
                self.flags,
                Some(data),
            )
        });
        if let Err(e) = attempt {
            debug!("{} is left to the runtime: {e}", self.target.display());
            return Ok(false);
        }
        // The first bind call ignores every other flag.
        let rest = self.flags.difference(MsFlags::MS_BIND | MsFlags::MS_REC);
        if bind && !rest.is_empty() {
            let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            resolve(root, &self.target)
                .and_then(|top| {
                    mount(
                        None::<&str>,
                        &path_of(&top),
                        None::<&str>,
                        again,
                        None::<&str>,
                    )
                })
                .map_err(|e| {
                    AgentError::io(format!("mounting {}", self.target.display()))(e.into())
                })?;
        }
        Ok(true)
    }
}

fn open(dir: &Path) -> Result<OwnedFd, AgentError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(dir, flags, Mode::empty())
        .map_err(|e| AgentError::io(dir.display().to_string())(io::Error::from(e)))
}

/// Opens what the container knows as `path`; links in it stay inside `root`.
fn resolve(root: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Makes the last folder of `path`.
fn make_dir(root: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::ENOENT);
    };
    let parent = resolve(root, parent)?;
    mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
    resolve(root, path)
}

/// A path to what a descriptor is open on.
fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(json: &str) -> Option<Plain> {
        plain(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn plain_mounts_are_taken() {
        let p = mount_of(
            r#"{"destination":"/etc/hosts","type":"bind","source":"/h","options":["rbind","rprivate","ro"]}"#,
        )
        .unwrap();
        assert_eq!(
            p.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY
        );
        assert_eq!((p.kind, p.data.as_str()), (None, ""));
        let p = mount_of(
            r#"{"destination":"/dev/pts","type":"devpts","source":"devpts",
                "options":["nosuid","noexec","newinstance","ptmxmode=0666"]}"#,
        )
        .unwrap();
        assert_eq!(
            (p.kind.as_deref(), p.data.as_str()),
            (Some("devpts"), "newinstance,ptmxmode=0666")
        );
    }

    #[test]
    fn the_rest_is_left_to_the_runtime() {
        for json in [
            r#"{"destination":"/proc","type":"proc","source":"proc"}"#,
            r#"{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue"}"#,
            r#"{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup"}"#,
            r#"{"destination":"/a","type":"bind","source":"/b","options":["rbind","rshared"]}"#,
            r#"{"destination":"/a","type":"bind","source":"/b","options":["bind","rro"]}"#,
            r#"{"destination":"/a","type":"bind","source":"/b"}"#,
            r#"{"destination":"/a","type":"tmpfs","source":"tmpfs","options":["tmpcopyup"]}"#,
        ] {
            assert_eq!(mount_of(json), None, "{json}");
        }
    }

    #[test]
    fn links_do_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/../../etc", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("lost")).unwrap();
        let root = open(dir.path()).unwrap();
        for path in ["/etc", "/link", "../../etc"] {
            let fd = resolve(&root, Path::new(path)).unwrap();
            assert_eq!(
                fs::read_link(path_of(&fd)).unwrap(),
                dir.path().join("etc"),
                "{path}"
            );
        }
        assert_eq!(
            resolve(&root, Path::new("/lost/x")).unwrap_err(),
            Errno::ENOENT
        );
        make_dir(&root, Path::new("/link/new")).unwrap();
        assert!(dir.path().join("etc/new").is_dir());
        assert_eq!(
            make_dir(&root, Path::new("/gone/new")).unwrap_err(),
            Errno::ENOENT
        );
    }
}
