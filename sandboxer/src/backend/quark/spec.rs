//! What Quark is told of a pod and of a container.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tracing::warn;

use crate::backend::MachineRequest;
use crate::backend::place::on_host;
use crate::pod::storage::ROOTFS;
use crate::pod::{PodError, Result};

/// The `config.json` of a sandbox: its network, and the limits of the pod.
pub(super) fn sandbox_config(request: &MachineRequest) -> Value {
    let network = match &request.netns {
        Some(path) => json!({"type": "network", "path": path}),
        // One of its own: never the host's.
        None => json!({"type": "network"}),
    };
    json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": [], "cwd": "/"},
        "root": {"path": ROOTFS},
        "linux": {"namespaces": [network], "resources": resources(request)},
    })
}

/// Limits that are set, as OCI has them.
fn resources(request: &MachineRequest) -> Value {
    let limits = request.limits.clone().unwrap_or_default();
    let (mut cpu, mut memory) = (Map::new(), Map::new());
    let mut set = |name: &str, value: i64| {
        if value > 0 {
            cpu.insert(name.to_owned(), json!(value));
        }
    };
    set("quota", limits.cpu_quota);
    set("period", limits.cpu_period);
    set("shares", limits.cpu_shares);
    for (name, list) in [("cpus", limits.cpuset_cpus), ("mems", limits.cpuset_mems)] {
        if !list.is_empty() {
            cpu.insert(name.to_owned(), json!(list));
        }
    }
    if limits.memory_limit_in_bytes > 0 {
        memory.insert("limit".to_owned(), json!(limits.memory_limit_in_bytes));
    }
    json!({"cpu": cpu, "memory": memory})
}

/// A file or folder of the host at a place of a container's root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bind {
    pub(super) source: PathBuf,
    pub(super) destination: String,
    pub(super) read_only: bool,
}

/// Rewrites the spec of a container as guests get it for Quark, which has the root file system
/// in the container's folder with everything mounted on it; returns what is to be mounted.
///
/// # Errors
/// It is no spec, or something is not in the share.
pub(super) fn rewrite(
    spec: &mut Value,
    hostname: &str,
    share: &Path,
    shm: &Path,
) -> Result<Vec<Bind>> {
    let spec = spec.as_object_mut().ok_or_else(|| {
        PodError::invalid(
            "config.json",
            "not an object",
            "must be an OCI runtime spec",
        )
    })?;
    if let Some(root) = spec.get_mut("root").and_then(Value::as_object_mut) {
        root.insert("path".to_owned(), json!(ROOTFS));
    }
    spec.entry("hostname").or_insert_with(|| json!(hostname));
    if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
        linux.remove("cgroupsPath");
        let namespaces = linux.get_mut("namespaces").and_then(Value::as_array_mut);
        for namespace in namespaces.into_iter().flatten() {
            if namespace
                .as_object_mut()
                .and_then(|n| n.remove("path"))
                .is_some()
            {
                // CRI's default, so nobody may have asked for it.
                warn!("a container in Quark has a PID namespace of its own, not the pod's");
            }
        }
    }
    let mut binds = Vec::new();
    if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
        for mount in mounts.iter().filter(|mount| is_bind(mount)) {
            binds.push(bind(mount, share, shm)?);
        }
        mounts.retain(|mount| !is_bind(mount));
    }
    Ok(binds)
}

fn is_bind(mount: &Value) -> bool {
    text(mount, "type") == "bind" || options(mount).any(|o| o == "bind" || o == "rbind")
}

fn bind(mount: &Value, share: &Path, shm: &Path) -> Result<Bind> {
    let (source, destination) = (text(mount, "source"), text(mount, "destination"));
    let on_host = match source {
        agent_api::POD_SHM => Some(shm.to_owned()),
        source => on_host(source, share),
    };
    let source = on_host
        .ok_or_else(|| PodError::invalid("mount source", source, "must lie in the pod's share"))?;
    Ok(Bind {
        source,
        destination: destination.to_owned(),
        read_only: options(mount).any(|o| o == "ro"),
    })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

fn options(mount: &Value) -> impl Iterator<Item = &str> {
    let options = mount.get("options").and_then(Value::as_array);
    options.into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::cri::LinuxContainerResources;

    fn request(netns: Option<&str>, limits: Option<LinuxContainerResources>) -> MachineRequest {
        MachineRequest {
            pod: "p1".to_owned(),
            vcpus: 1,
            memory_bytes: 1 << 30,
            share: "/d/p1/shared".into(),
            dir: "/d/p1".into(),
            netns: netns.map(PathBuf::from),
            limits,
            disks: Vec::new(),
        }
    }

    #[test]
    fn the_pods_limits_and_network_reach_the_sandbox() {
        let limits = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            memory_limit_in_bytes: 64 << 20,
            cpuset_cpus: "0-1".to_owned(),
            ..Default::default()
        };
        let config = sandbox_config(&request(Some("/run/netns/a"), Some(limits)));
        assert_eq!(
            config["linux"],
            json!({
                "namespaces": [{"type": "network", "path": "/run/netns/a"}],
                "resources": {
                    "cpu": {"quota": 150_000, "period": 100_000, "cpus": "0-1"},
                    "memory": {"limit": 64 << 20},
                },
            })
        );
        let config = sandbox_config(&request(None, None));
        assert_eq!(config["linux"]["namespaces"], json!([{"type": "network"}]));
        assert_eq!(
            config["linux"]["resources"],
            json!({"cpu": {}, "memory": {}})
        );
    }

    #[test]
    fn binds_are_taken_out_and_the_rest_stays() {
        let mut spec = json!({
            "root": {"path": "/run/kuasar/state/c1/rootfs", "readonly": true},
            "linux": {"cgroupsPath": "/x", "namespaces": [{"type": "pid", "path": "/run/p"}]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind",
                 "source": "/run/kuasar/state/etc/hosts", "options": ["bind", "ro"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                 "options": ["bind"]},
            ],
        });
        let (share, shm) = (Path::new("/d/p1/shared"), Path::new("/d/p1/shm"));
        let binds = rewrite(&mut spec, "web", share, shm).unwrap();
        let bind = |source: &str, destination: &str, read_only| Bind {
            source: source.into(),
            destination: destination.to_owned(),
            read_only,
        };
        let hosts = bind("/d/p1/shared/etc/hosts", "/etc/hosts", true);
        assert_eq!(binds, [hosts, bind("/d/p1/shm", "/dev/shm", false)]);
        assert_eq!(
            spec,
            json!({
                "hostname": "web",
                "root": {"path": "rootfs", "readonly": true},
                "linux": {"namespaces": [{"type": "pid"}]},
                "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            })
        );
    }

    #[test]
    fn only_what_is_shared_is_mounted() {
        let (share, shm) = (Path::new("/s"), Path::new("/m"));
        let mut spec = json!({"mounts": [
            {"destination": "/a", "type": "bind", "source": "/etc"},
        ]});
        let error = rewrite(&mut spec, "web", share, shm).unwrap_err();
        assert!(error.to_string().contains("share"), "{error}");
    }
}
