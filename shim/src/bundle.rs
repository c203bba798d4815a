//! What a bundle says about the container that it is for.
//!
//! A bundle of a sandbox need not have a `config.json`, and nothing in one has to be right.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::rpc::cri::{LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig};

/// Annotations that name the sandbox of a container.
const GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// The parts of an OCI spec that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Spec {
    annotations: std::collections::BTreeMap<String, String>,
    hostname: String,
    linux: Linux,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Linux {
    namespaces: Vec<Namespace>,
    resources: Resources,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    r#type: String,
    path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    cpu: Cpu,
    memory: Memory,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    quota: i64,
    period: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: i64,
}

impl Spec {
    /// Reads it from a bundle; what is missing or damaged counts as empty.
    pub(crate) fn read(bundle: &Path) -> Self {
        std::fs::read(bundle.join("config.json"))
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default()
    }

    /// The sandbox that a container belongs to, if it is not one of its own.
    pub(crate) fn group(&self) -> Option<&str> {
        GROUPS
            .iter()
            .find_map(|key| self.annotations.get(*key))
            .map(String::as_str)
            .filter(|group| !group.is_empty())
    }

    /// The network namespace that the container joins; empty when there is none.
    pub(crate) fn netns(&self) -> String {
        self.linux
            .namespaces
            .iter()
            .find(|namespace| namespace.r#type == "network")
            .map(|namespace| namespace.path.clone())
            .unwrap_or_default()
    }

    /// What a pod made for this one container is to be.
    pub(crate) fn pod(&self) -> PodSandboxConfig {
        let Resources { cpu, memory } = &self.linux.resources;
        PodSandboxConfig {
            hostname: self.hostname.clone(),
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(LinuxContainerResources {
                    cpu_quota: cpu.quota,
                    cpu_period: cpu.period,
                    memory_limit_in_bytes: memory.limit,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Undoes what may be mounted on the bundle's rootfs. Idempotent.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn release(bundle: &Path) -> Result<(), crate::Error> {
    use nix::errno::Errno;
    use nix::mount::{MntFlags, umount2};

    let rootfs: PathBuf = bundle.join("rootfs");
    loop {
        match umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // There may be another mount below.
            Ok(()) => {}
            // Not a mount point; no such file.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => {
                let what = format!("unmounting {}", rootfs.display());
                return Err(crate::Error::io(what)(e.into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_names_its_pod() {
        let dir = tempfile::tempdir().unwrap();
        let none = Spec::read(dir.path());
        assert_eq!((none.group(), none.netns()), (None, String::new()));
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"hostname": "h", "annotations": {"io.kubernetes.cri.sandbox-id": "pod1"},
                "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
                          "resources": {"memory": {"limit": 7}}}}"#,
        )
        .unwrap();
        let spec = Spec::read(dir.path());
        assert_eq!(
            (spec.group(), spec.netns()),
            (Some("pod1"), "/n".to_owned())
        );
        let pod = spec.pod();
        assert_eq!(pod.hostname, "h");
        let resources = pod.linux.unwrap().resources.unwrap();
        assert_eq!(resources.memory_limit_in_bytes, 7);
    }

    #[test]
    fn a_bundle_without_mounts_is_released() {
        let bundle = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            match release(bundle.path()) {
                Ok(()) => {}
                Err(e) => println!("skipped: {e}"),
            }
        }
    }
}
