//! The OCI runtime spec of a container, as other engines write it.

use bytesize::ByteSize;
use serde_json::{Map, Value, json};

use super::disk::DiskArg;
use super::values::{CPU_PERIOD_US, Cpus, Volume};
use crate::image::Identity;

const OCI_VERSION: &str = "1.0.2";
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an ordinary container may do: the set that container engines agree on.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Every capability of Linux 6.1, the guest's kernel.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// Parts of /proc and /sys that tell or change too much.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// A process inside a container.
#[derive(Clone, Debug, Default)]
pub(super) struct ProcessSpec {
    pub(super) args: Vec<String>,
    /// `NAME=VALUE`, already merged.
    pub(super) env: Vec<String>,
    pub(super) cwd: String,
    pub(super) user: Identity,
    pub(super) tty: bool,
    pub(super) privileged: bool,
}

/// A container.
#[derive(Clone, Debug, Default)]
pub(super) struct ContainerSpec {
    pub(super) process: ProcessSpec,
    pub(super) read_only: bool,
    pub(super) volumes: Vec<Volume>,
    pub(super) disks: Vec<DiskArg>,
    pub(super) cpus: Option<Cpus>,
    pub(super) memory: Option<ByteSize>,
}

impl ProcessSpec {
    /// The OCI `process`.
    pub(super) fn to_json(&self) -> Value {
        let capabilities: &[&str] = if self.privileged {
            &ALL_CAPABILITIES
        } else {
            &CAPABILITIES
        };
        // As with execve: only root keeps what the bounding set allows.
        let held: &[&str] = if self.user.uid == 0 {
            capabilities
        } else {
            &[]
        };
        json!({
            "terminal": self.tty,
            "user": {
                "uid": self.user.uid,
                "gid": self.user.gid,
                "additionalGids": self.user.additional_gids,
            },
            "args": self.args,
            "env": self.env_with_defaults(),
            "cwd": if self.cwd.is_empty() { "/" } else { &self.cwd },
            "capabilities": {
                "bounding": capabilities,
                "effective": held,
                "permitted": held,
                "inheritable": [],
                "ambient": [],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524_288}],
            "noNewPrivileges": false,
        })
    }

    /// What programs expect to find, unless it is set.
    fn env_with_defaults(&self) -> Vec<String> {
        let mut env = self.env.clone();
        let mut default = |setting: String| {
            let name = setting.split('=').next().unwrap_or_default().to_owned();
            if !env.iter().any(|e| e.split('=').next() == Some(&name)) {
                env.push(setting);
            }
        };
        default(DEFAULT_PATH.to_owned());
        let home = self.user.home.as_deref().unwrap_or("/");
        default(format!("HOME={home}"));
        if self.tty {
            default("TERM=xterm".to_owned());
        }
        env
    }
}

impl ContainerSpec {
    /// The whole `config.json`. The container shares the pod's network, IPC and UTS
    /// namespaces by not naming any.
    pub(super) fn to_json(&self) -> Value {
        let privileged = self.process.privileged;
        let none: [&str; 0] = [];
        json!({
            "ociVersion": OCI_VERSION,
            "process": self.process.to_json(),
            "root": {"path": "rootfs", "readonly": self.read_only},
            "mounts": self.mounts(),
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
                "maskedPaths": if privileged { json!(none) } else { json!(MASKED) },
                "readonlyPaths": if privileged { json!(none) } else { json!(READ_ONLY) },
                "resources": self.resources(),
            },
        })
    }

    fn mounts(&self) -> Vec<Value> {
        let access = if self.process.privileged { "rw" } else { "ro" };
        let mount = |destination: &str, fstype: &str, options: &[&str]| {
            let source = if fstype == "bind" { "" } else { fstype };
            json!({"destination": destination, "type": fstype, "source": source, "options": options})
        };
        let mut mounts = vec![
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev",
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
            mount(
                "/dev/pts",
                "devpts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                    "gid=5",
                ],
            ),
            mount(
                "/dev/shm",
                "tmpfs",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", access]),
            mount(
                "/sys/fs/cgroup",
                "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", access],
            ),
        ];
        // A volume over one of these replaces it.
        let volumes = self.volumes.iter().map(|v| v.destination.as_path());
        let taken: Vec<_> = volumes
            .chain(self.disks.iter().map(DiskArg::destination))
            .collect();
        mounts.retain(|m| !taken.iter().any(|path| json!(path) == m["destination"]));
        mounts.extend(self.volumes.iter().map(|volume| {
            json!({
                "destination": volume.destination,
                "type": "bind",
                "source": volume.source,
                "options": ["rbind", "rprivate", if volume.read_only { "ro" } else { "rw" }],
            })
        }));
        mounts.extend(self.disks.iter().map(DiskArg::to_mount));
        mounts
    }

    fn resources(&self) -> Value {
        let mut resources = limits(self.memory, self.cpus);
        let devices = json!([{"allow": self.process.privileged, "access": "rwm"}]);
        resources.insert("devices".to_owned(), devices);
        Value::Object(resources)
    }
}

/// The limits that were given, as fields of OCI `LinuxResources`.
pub(super) fn limits(memory: Option<ByteSize>, cpus: Option<Cpus>) -> Map<String, Value> {
    let mut limits = Map::new();
    if let Some(memory) = memory {
        limits.insert("memory".to_owned(), json!({"limit": memory.as_u64()}));
    }
    if let Some(cpus) = cpus {
        let cpu = json!({"quota": cpus.quota_us, "period": CPU_PERIOD_US});
        limits.insert("cpu".to_owned(), cpu);
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> ContainerSpec {
        ContainerSpec {
            process: ProcessSpec {
                args: vec!["/bin/sh".to_owned()],
                env: vec!["A=1".to_owned()],
                cwd: "/tmp".to_owned(),
                user: Identity::default(),
                tty: true,
                privileged: false,
            },
            disks: Vec::new(),
            volumes: vec![Volume {
                source: "/host".into(),
                destination: "/data".into(),
                read_only: true,
            }],
            cpus: Some("1.5".parse().unwrap()),
            memory: Some(ByteSize::mib(64)),
            read_only: true,
        }
    }

    fn destinations(spec: &Value) -> Vec<&str> {
        let mounts = spec["mounts"].as_array().unwrap();
        mounts
            .iter()
            .map(|m| m["destination"].as_str().unwrap())
            .collect()
    }

    #[test]
    fn the_spec_is_one_that_runtimes_accept() {
        let spec = container().to_json();
        let typed: oci_spec::runtime::Spec = serde_json::from_value(spec.clone()).unwrap();
        assert_eq!(
            typed.process().as_ref().unwrap().args().as_ref().unwrap(),
            &["/bin/sh"]
        );
        assert!(typed.root().as_ref().unwrap().readonly().unwrap());
        assert_eq!(spec["process"]["terminal"], true);
        assert_eq!(spec["process"]["cwd"], "/tmp");
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 64 << 20);
        assert_eq!(spec["linux"]["resources"]["cpu"]["quota"], 150_000);
        let kinds = spec["linux"]["namespaces"].as_array().unwrap();
        assert!(
            kinds
                .iter()
                .all(|n| n["type"] != "network" && n["type"] != "uts")
        );
    }

    #[test]
    fn volumes_come_last_and_replace_defaults() {
        let spec = container().to_json();
        let last = spec["mounts"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(last["destination"], "/data");
        assert_eq!(last["options"], json!(["rbind", "rprivate", "ro"]));
        let mut shm = container();
        shm.volumes[0].destination = "/dev/shm".into();
        let spec = shm.to_json();
        let places = destinations(&spec);
        assert_eq!(places.iter().filter(|d| **d == "/dev/shm").count(), 1);
    }

    #[test]
    fn environment_gets_defaults_only_where_unset() {
        let mut process = container().process;
        let env = process.to_json()["env"].clone();
        assert_eq!(env, json!(["A=1", DEFAULT_PATH, "HOME=/", "TERM=xterm"]));
        process.env = vec!["PATH=/x".to_owned(), "TERM=".to_owned()];
        process.user.home = Some("/home/u".to_owned());
        let env = process.to_json()["env"].clone();
        assert_eq!(env, json!(["PATH=/x", "TERM=", "HOME=/home/u"]));
    }

    #[test]
    fn privileges() {
        let mut container = container();
        let spec = container.to_json();
        assert_eq!(
            spec["process"]["capabilities"]["effective"],
            json!(CAPABILITIES)
        );
        assert!(spec["linux"]["maskedPaths"].as_array().unwrap().len() > 5);
        container.process.user.uid = 1000;
        let spec = container.to_json();
        assert_eq!(spec["process"]["capabilities"]["effective"], json!([]));
        assert_eq!(
            spec["process"]["capabilities"]["bounding"],
            json!(CAPABILITIES)
        );
        container.process.user.uid = 0;
        container.process.privileged = true;
        let spec = container.to_json();
        assert_eq!(
            spec["process"]["capabilities"]["effective"],
            json!(ALL_CAPABILITIES.as_slice())
        );
        assert_eq!(spec["linux"]["readonlyPaths"], json!([]));
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
        let typed: Result<oci_spec::runtime::Spec, _> = serde_json::from_value(spec);
        typed.unwrap();
    }
}
