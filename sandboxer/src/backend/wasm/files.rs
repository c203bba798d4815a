//! The files of a container: folders that its programs see.
//!
//! Folders become preopened folders, which keep their mode. A single file cannot be one, so it
//! is mounted where its place in the root file system is; so is memory. These mounts lie on
//! the container's root and go with it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use tracing::warn;

use super::spec::{Mount, Source, Spec};

/// What the programs of a container see. Blocks.
pub(super) fn arrange(spec: &Spec) -> Vec<wasm_host::Mount> {
    let mut folders = vec![wasm_host::Mount {
        host: spec.root.clone(),
        guest: "/".to_owned(),
        read_only: spec.read_only,
    }];
    for wanted in &spec.mounts {
        let folder = match &wanted.source {
            Source::Bind(path) if path.is_dir() => Some(path.clone()),
            Source::Bind(path) => {
                place(&spec.root, wanted, |target| {
                    bind(path, target, wanted.read_only)
                });
                None
            }
            Source::Memory(options) => {
                let mounted = place(&spec.root, wanted, |target| memory(options, target));
                // Below a root that is read-only it needs its own mode. The programs cannot move
                // what lies on the way there then.
                let own = mounted && spec.read_only;
                own.then(|| spec.root.join(wanted.destination.trim_start_matches('/')))
            }
        };
        folders.extend(folder.map(|host| wasm_host::Mount {
            host,
            guest: wanted.destination.clone(),
            read_only: wanted.read_only || spec.read_only && wanted.destination == "/",
        }));
    }
    folders
}

/// Mounts something on its place in the root file system. A root without that place, which
/// cannot be written to, is no reason not to run a program that may not need it. Whether it is
/// mounted.
fn place(root: &Path, wanted: &Mount, mounting: impl FnOnce(&Path) -> io::Result<()>) -> bool {
    let is_dir = matches!(wanted.source, Source::Memory(_));
    let mounted = target(root, &wanted.destination, is_dir).and_then(|target| {
        mounting(&PathBuf::from(format!(
            "/proc/self/fd/{}",
            target.as_raw_fd()
        )))
    });
    if let Err(e) = &mounted {
        warn!("the container goes without {}: {e}", wanted.destination);
    }
    mounted.is_ok()
}

/// Opens the place `destination` below `root`, making it where it is missing, without leaving
/// `root`.
fn target(root: &Path, destination: &str, is_dir: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut here = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut names = Path::new(destination)
        .components()
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name),
            _ => None,
        })
        .peekable();
    while let Some(name) = names.next() {
        let folder = is_dir || names.peek().is_some();
        let opened = openat2(here.as_fd(), name, flags, Mode::empty(), inside);
        here = match opened {
            Err(rustix::io::Errno::NOENT) if folder => {
                mkdirat(here.as_fd(), name, Mode::from_raw_mode(0o755))?;
                openat2(here.as_fd(), name, flags, Mode::empty(), inside)?
            }
            Err(rustix::io::Errno::NOENT) => {
                let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                openat2(
                    here.as_fd(),
                    name,
                    create,
                    Mode::from_raw_mode(0o644),
                    inside,
                )?
            }
            opened => opened?,
        };
    }
    Ok(here)
}

fn bind(source: &Path, target: &Path, read_only: bool) -> io::Result<()> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)?;
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

fn memory(options: &str, target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let data = (!options.is_empty()).then_some(options);
    mount(Some("tmpfs"), target, Some("tmpfs"), flags, data)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_made_and_never_outside() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::os::unix::fs::symlink(top.path(), root.join("out")).unwrap();
        target(&root, "/etc/hosts", false).unwrap();
        target(&root, "/new/folder/", true).unwrap();
        target(&root, "/new/file", false).unwrap();
        assert!(root.join("etc/hosts").is_file() && root.join("new/file").is_file());
        assert!(root.join("new/folder").is_dir());
        target(&root, "/out/file", false).unwrap_err();
        assert!(!top.path().join("file").exists());
        // `..` is left out as in any OCI runtime.
        target(&root, "/../etc/hosts", false).unwrap();
    }
}
