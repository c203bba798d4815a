//! Turns the OCI spec of a container as the host means it into one for the guest.
//!
//! The spec is edited as JSON, so that keys this daemon does not know reach the guest. What
//! only makes sense on the host (namespace paths, devices, LSM labels, hooks, CPU sets) is
//! taken out; a line in the log says so where a user asked for it.

mod devices;
mod mounts;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};
use tracing::warn;

use super::disks::plan::WantedDisk;
use super::error::{PodError, Result};
use super::storage::{Bind, MOUNTS, ROOTFS};

pub(crate) use devices::set_numbers;
pub(crate) use mounts::PodFile;

/// What a spec is rewritten for.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    /// The container's id.
    pub(crate) container: &'a str,
    /// `/etc/hosts` and the like, as they are in the guest.
    pub(crate) files: &'a [PodFile],
    /// What the caller takes for the pid of the pod's own process.
    pub(crate) pod_pid: u32,
    /// Pids in the guest of the pod's containers.
    pub(crate) pids: &'a [u32],
    /// Whether the pod may have everything of its guest. containerd then lists all devices of
    /// the host.
    pub(crate) privileged: bool,
}

impl Guest<'_> {
    fn path(&self, rest: &str) -> String {
        format!("{}/{}/{rest}", agent_api::SHARE_DIR, self.container)
    }
}

/// What a spec needs of the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// To be bound under the share.
    pub(crate) binds: Vec<Bind>,
    /// To be plugged in.
    pub(crate) disks: Vec<WantedDisk>,
}

/// Rewrites `spec` and returns what it needs of the host. Block devices in it get their
/// numbers when they are plugged in: [`set_numbers`].
///
/// # Errors
/// The spec is not an object or asks for something no guest can have.
pub(crate) fn rewrite(spec: &mut Value, guest: &Guest<'_>) -> Result<Needs> {
    let object = spec.as_object_mut().ok_or_else(|| {
        PodError::invalid(
            "config.json",
            "not an object",
            "must be an OCI runtime spec",
        )
    })?;
    set_root(object, guest)?;
    if let Some(process) = object.get_mut("process") {
        clean_process(process, guest.container)?;
    }
    let shares_memory = joins_ipc(object);
    let mut needs = Needs::default();
    if let Some(linux) = object.get_mut("linux").and_then(Value::as_object_mut) {
        needs.disks = devices::rewrite(linux, guest)?;
    }
    let joins_uts = clean_linux(object, guest)?;
    if joins_uts {
        // The guest's own host name is the pod's.
        object.remove("hostname");
        object.remove("domainname");
    }
    if object
        .remove("hooks")
        .is_some_and(|hooks| !is_empty(&hooks))
    {
        warn!(
            container = guest.container,
            "OCI hooks are programs of the host; none is run"
        );
    }
    mounts::rewrite(object, guest, shares_memory, &mut needs)?;
    Ok(needs)
}

/// The guest has the root file system at `path`.
pub(crate) fn move_root(spec: &mut Value, path: &str) {
    if let Some(root) = spec.get_mut("root").and_then(Value::as_object_mut) {
        root.insert("path".to_owned(), Value::String(path.to_owned()));
    }
}

fn set_root(spec: &mut Map<String, Value>, guest: &Guest<'_>) -> Result<()> {
    let root = spec
        .entry("root")
        .or_insert_with(|| Value::Object(Map::new()))
        .as_object_mut()
        .ok_or_else(|| PodError::invalid("config.json: root", "", "must be an object"))?;
    root.insert("path".to_owned(), Value::String(guest.path(ROOTFS)));
    Ok(())
}

/// AppArmor profiles that runtimes give every container; nobody asked for them.
const DEFAULT_PROFILES: [&str; 4] = [
    "cri-containerd.apparmor.d",
    "docker-default",
    "isula-default",
    "unconfined",
];

/// Takes what only the host has out of an OCI process.
///
/// # Errors
/// An AppArmor profile was asked for, which the guest's kernel does not know.
pub(crate) fn clean_process(process: &mut Value, container: &str) -> Result<()> {
    let Some(process) = process.as_object_mut() else {
        return Ok(());
    };
    let profile = process.get("apparmorProfile").and_then(Value::as_str);
    if let Some(profile) = profile
        && !profile.is_empty()
        && !DEFAULT_PROFILES.contains(&profile)
    {
        return Err(PodError::invalid(
            "process.apparmorProfile",
            profile,
            "AppArmor profiles of the host cannot be enforced in a guest: remove it, or use a \
             runtime class without VM for this pod",
        ));
    }
    for key in ["apparmorProfile", "selinuxLabel"] {
        if process.remove(key).is_some_and(|value| !is_empty(&value)) {
            warn!(
                container,
                "process.{key} names something of the host; ignored"
            );
        }
    }
    Ok(())
}

/// Returns whether the container uses the pod's UTS namespace, which is the guest's own.
fn clean_linux(spec: &mut Map<String, Value>, guest: &Guest<'_>) -> Result<bool> {
    let container = guest.container;
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return Ok(true);
    };
    linux.insert(
        "cgroupsPath".to_owned(),
        Value::String(format!("/kuasar/{container}")),
    );
    // Arranged on the host; in the guest the root stands alone.
    linux.remove("rootfsPropagation");
    for (key, meaning) in [
        ("mountLabel", "an SELinux label of the host"),
        ("intelRdt", "cache ways of the host"),
        ("netDevices", "network devices of the host"),
    ] {
        if linux.remove(key).is_some_and(|value| !is_empty(&value)) {
            warn!(container, "linux.{key} names {meaning}; ignored");
        }
    }
    if let Some(resources) = linux.get_mut("resources") {
        check_huge_pages(resources)?;
        clean_resources(resources);
    }
    clean_namespaces(linux, guest)
}

/// A limit of 0, which the kubelet sends for each size of the host's, promises nothing.
fn check_huge_pages(resources: &Value) -> Result<()> {
    let limits = resources.get("hugepageLimits").and_then(Value::as_array);
    let promised = |limit: &&Value| limit.get("limit").and_then(Value::as_u64) > Some(0);
    match limits.into_iter().flatten().find(promised) {
        None => Ok(()),
        Some(limit) => Err(PodError::invalid(
            "linux.resources.hugepageLimits",
            limit.to_string(),
            "guests have no huge pages: remove the limit, or use a runtime class without VM for \
             this pod",
        )),
    }
}

/// Takes limits that name hardware of the host out of OCI `LinuxResources`.
pub(crate) fn clean_resources(resources: &mut Value) {
    let Some(resources) = resources.as_object_mut() else {
        return;
    };
    for key in ["blockIO", "hugepageLimits", "network", "rdma"] {
        resources.remove(key);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        // Numbers of host CPUs mean nothing in the guest.
        cpu.remove("cpus");
        cpu.remove("mems");
    }
}

/// The guest itself is the pod's network, IPC and UTS namespace, so a container that joins
/// those by a path of the host just stays in the guest's.
fn clean_namespaces(linux: &mut Map<String, Value>, guest: &Guest<'_>) -> Result<bool> {
    let Some(namespaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) else {
        return Ok(true);
    };
    namespaces.retain(|namespace| {
        let joins = namespace
            .get("path")
            .and_then(Value::as_str)
            .is_some_and(|path| !path.is_empty());
        match namespace.get("type").and_then(Value::as_str) {
            Some("network") => false,
            Some("ipc" | "uts") => !joins,
            _ => true,
        }
    });
    for namespace in namespaces.iter_mut() {
        if let Some(namespace) = namespace.as_object_mut() {
            let path = namespace.remove("path");
            let path = path.as_ref().and_then(Value::as_str).unwrap_or_default();
            if namespace.get("type").and_then(Value::as_str) == Some("pid") && !path.is_empty() {
                let joined = pid_namespace(path, guest)?;
                namespace.insert("path".to_owned(), Value::String(joined));
            }
        }
    }
    Ok(!namespaces
        .iter()
        .any(|namespace| namespace.get("type").and_then(Value::as_str) == Some("uts")))
}

/// The PID namespace in the guest that a path of the host's `/proc` means: the pod's, or that
/// of one of its containers, whose pids are the guest's.
fn pid_namespace(path: &str, guest: &Guest<'_>) -> Result<String> {
    let pid = path
        .strip_prefix("/proc/")
        .and_then(|rest| rest.strip_suffix("/ns/pid"))
        .and_then(|pid| pid.parse::<u32>().ok());
    match pid {
        Some(pid) if pid == guest.pod_pid || pid == 0 => {
            Ok(agent_api::POD_PID_NAMESPACE.to_owned())
        }
        Some(pid) if guest.pids.contains(&pid) => Ok(path.to_owned()),
        _ => Err(PodError::invalid(
            "linux.namespaces (pid)",
            path,
            "must be that of the pod or of a container in it",
        )),
    }
}

/// Whether the container is in the pod's IPC namespace. Tells before paths are taken out.
fn joins_ipc(spec: &Map<String, Value>) -> bool {
    let namespaces = spec.get("linux").and_then(|linux| linux.get("namespaces"));
    let mut namespaces = namespaces.and_then(Value::as_array).into_iter().flatten();
    namespaces.any(|namespace| {
        let text = |key| namespace.get(key).and_then(Value::as_str);
        text("type") == Some("ipc") && text("path").is_some_and(|path| !path.is_empty())
    })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.values().all(is_empty),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Path in the guest of the bind `name` of a container.
fn bind_path(guest: &Guest<'_>, name: &str) -> String {
    guest.path(&format!("{MOUNTS}/{name}"))
}
