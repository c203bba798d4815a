//! The files of a container: folders that its programs see.
//!
//! Folders become preopened folders, which keep their mode. A single file cannot be one, so it
//! is mounted where its place in the root file system is; so is memory. These mounts lie on
//! the container's root and go with it.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use tracing::warn;

use super::super::place;
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
                    place::bind(path, target, wanted.read_only)
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
    let mounted = place::target(root, &wanted.destination, is_dir)
        .and_then(|target| mounting(&place::path_of(&target)));
    if let Err(e) = &mounted {
        warn!("the container goes without {}: {e}", wanted.destination);
    }
    mounted.is_ok()
}

fn memory(options: &str, target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let data = (!options.is_empty()).then_some(options);
    mount(Some("tmpfs"), target, Some("tmpfs"), flags, data)?;
    Ok(())
}
