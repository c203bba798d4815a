//! The mounts of a spec: binds come through the share, the rest is the guest's own.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tracing::warn;

use super::super::disks::plan;
use super::super::error::{PodError, Result};
use super::{Bind, Guest, Needs, bind_path, devices};

/// Type of a mount that makes a block device or an image a device of the container, at the
/// mount's destination.
const DEVICE: &str = "block";

/// A file of the pod that every container gets unless its spec brings one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodFile {
    /// Where containers see it.
    pub(crate) destination: &'static str,
    /// Where the guest has it.
    pub(crate) guest_path: String,
}

/// Rewrites `mounts`, adding what they need of the host.
pub(super) fn rewrite(
    spec: &mut Map<String, Value>,
    guest: &Guest<'_>,
    shares_memory: bool,
    needs: &mut Needs,
) -> Result<()> {
    take_devices(spec, needs);
    let read_only = spec
        .get("root")
        .and_then(|root| root.get("readonly"))
        .and_then(Value::as_bool)
        .unwrap_or(false);
    let mounts = spec
        .entry("mounts")
        .or_insert_with(|| Value::Array(Vec::new()))
        .as_array_mut()
        .ok_or_else(|| PodError::invalid("config.json: mounts", "", "must be an array"))?;
    mounts.retain(|mount| !replaced_by_pod_file(mount, guest.files));
    for mount in mounts.iter_mut() {
        if !(shares_memory && share_memory(mount)) {
            rewrite_one(mount, guest, needs)?;
        }
    }
    for file in guest.files {
        if !mounts
            .iter()
            .any(|mount| destination(mount) == file.destination)
        {
            let access = if read_only { "ro" } else { "rw" };
            mounts.push(json!({
                "destination": file.destination,
                "type": "bind",
                "source": file.guest_path,
                "options": ["bind", "rprivate", access],
            }));
        }
    }
    Ok(())
}

/// Makes mounts of block devices devices of the container.
fn take_devices(spec: &mut Map<String, Value>, needs: &mut Needs) {
    let mut found = Vec::new();
    if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
        mounts.retain(|mount| {
            let source = Path::new(text(mount, "source"));
            let device =
                text(mount, "type") == DEVICE || is_bind(mount) && devices::is_block(source);
            if device {
                let read_only = strings(mount.get("options")).iter().any(|o| o == "ro");
                found.push((source.to_owned(), destination(mount).to_owned(), read_only));
            }
            !device
        });
    }
    for (source, destination, read_only) in found {
        let disk = devices::from_mount(spec, &source, &destination, read_only);
        needs.disks.push(disk);
    }
}

/// Makes the mount of `/dev/shm` one of the pod's shared memory, which is the guest's: the
/// host's cannot be shared with the guest's kernel. A volume on `/dev/shm` is left alone.
fn share_memory(mount: &mut Value) -> bool {
    let is_volume = text(mount, "type") != "tmpfs" && !text(mount, "source").ends_with("/shm");
    if destination(mount) != "/dev/shm" || is_volume {
        return false;
    }
    if let Some(mount) = mount.as_object_mut() {
        mount.insert("type".to_owned(), json!("bind"));
        mount.insert("source".to_owned(), json!(agent_api::POD_SHM));
        let options = json!(["bind", "nosuid", "noexec", "nodev"]);
        mount.insert("options".to_owned(), options);
    }
    true
}

fn is_bind(mount: &Value) -> bool {
    let options = strings(mount.get("options"));
    text(mount, "type") == "bind" || options.iter().any(|o| o == "bind" || o == "rbind")
}

/// A file system on a block device or image: mounted by the guest, bound into the container.
fn rewrite_volume(mount: &mut Value, guest: &Guest<'_>, needs: &mut Needs) {
    let (fstype, source) = (text(mount, "type"), PathBuf::from(text(mount, "source")));
    if !plan::is_disk(fstype, &source) {
        return;
    }
    let options = strings(mount.get("options"));
    let target = plan::mount_point(guest.container, &needs.disks.len().to_string());
    let disk = plan::volume(&source, fstype, &options, target.clone());
    let bind = if disk.read_only {
        ["rbind", "ro"]
    } else {
        ["rbind", "rw"]
    };
    if let Some(object) = mount.as_object_mut() {
        object.insert("type".to_owned(), json!("bind"));
        object.insert("source".to_owned(), json!(target));
        object.insert("options".to_owned(), json!(bind));
    }
    needs.disks.push(disk);
}

fn rewrite_one(mount: &mut Value, guest: &Guest<'_>, needs: &mut Needs) -> Result<()> {
    if !is_bind(mount) {
        rewrite_volume(mount, guest, needs);
        return Ok(());
    }
    let options = strings(mount.get("options"));
    let binds = &mut needs.binds;
    let destination = destination(mount).to_owned();
    let object = mount
        .as_object_mut()
        .ok_or_else(|| PodError::invalid("config.json: mounts", "", "must hold objects"))?;
    let source = PathBuf::from(object.get("source").and_then(Value::as_str).unwrap_or(""));
    check_source(&source, &destination)?;
    let name = binds.len().to_string();
    object.insert("source".to_owned(), json!(bind_path(guest, &name)));
    if options.iter().any(|o| o == "rshared" || o == "shared") {
        warn!(
            container = guest.container,
            "mounts made in {destination} do not reach the host (Bidirectional propagation)"
        );
    }
    // Propagation is arranged on the host; in the guest the mount stands alone.
    let guest_options: Vec<&String> = options
        .iter()
        .filter(|o| !matches!(o.as_str(), "shared" | "rshared" | "slave" | "rslave"))
        .collect();
    object.insert("options".to_owned(), json!(guest_options));
    binds.push(Bind {
        source,
        name,
        options,
    });
    Ok(())
}

fn check_source(source: &Path, destination: &str) -> Result<()> {
    let invalid = |fix: String| {
        Err(PodError::invalid(
            "mount source",
            source.display().to_string(),
            format!("{fix} (mounted on {destination})"),
        ))
    };
    if !source.is_absolute() {
        return invalid("must be an absolute path".to_owned());
    }
    match std::fs::metadata(source) {
        Err(e) => invalid(format!("cannot be used: {e}")),
        Ok(meta) if meta.file_type().is_char_device() => {
            invalid("is a device of the host, which a guest cannot use".to_owned())
        }
        Ok(meta) if meta.file_type().is_socket() => invalid(
            "is a socket of the host, to which programs in a guest cannot connect".to_owned(),
        ),
        Ok(_) => Ok(()),
    }
}

/// containerd 1.7 mounts a folder it made up where a pod without a pause container has no
/// hosts file: whatever is not a file gives way to the pod's own.
fn replaced_by_pod_file(mount: &Value, files: &[PodFile]) -> bool {
    files
        .iter()
        .any(|file| file.destination == destination(mount))
        && !Path::new(text(mount, "source")).is_file()
}

fn destination(mount: &Value) -> &str {
    let path = text(mount, "destination");
    match path.trim_end_matches('/') {
        "" => path,
        trimmed => trimmed,
    }
}

fn text<'a>(mount: &'a Value, key: &str) -> &'a str {
    mount.get(key).and_then(Value::as_str).unwrap_or("")
}

fn strings(value: Option<&Value>) -> Vec<String> {
    value
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect()
}
