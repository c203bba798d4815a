//! What an OCI spec means for a WebAssembly program.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tracing::warn;
use wasm_host::{CpuQuota, Limits};

use crate::backend::place::on_host;
use crate::config;
use crate::pod::PodError;

/// Environment that says where an HTTP component serves, as runwasi has it.
const HTTP_LISTEN: &str = "WASMTIME_HTTP_PROXY_SOCKET_ADDR";

/// Where file systems are that only a Linux system has a use for. What the user puts there, such
/// as the kubelet's file for last words, is a bind.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A process of a spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    /// Absolute.
    pub(super) cwd: String,
    /// Soft limit of open files.
    pub(super) files: Option<usize>,
}

impl Process {
    pub(super) fn of(process: &Value) -> Result<Self, PodError> {
        let args = strings(process.get("args"));
        if args.first().is_none_or(String::is_empty) {
            return Err(PodError::invalid(
                "process.args",
                "[]",
                "must name a WebAssembly program first",
            ));
        }
        let env = strings(process.get("env"))
            .into_iter()
            .filter_map(|setting| {
                let (name, value) = setting.split_once('=')?;
                Some((name.to_owned(), value.to_owned()))
            })
            .collect();
        let cwd = match process.get("cwd").and_then(Value::as_str) {
            Some(cwd) if cwd.starts_with('/') => cwd.to_owned(),
            _ => "/".to_owned(),
        };
        let files = process
            .get("rlimits")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .find(|limit| limit.get("type").and_then(Value::as_str) == Some("RLIMIT_NOFILE"))
            .and_then(|limit| limit.get("soft").and_then(Value::as_u64))
            .and_then(|files| usize::try_from(files).ok());
        Ok(Self {
            args,
            env,
            cwd,
            files,
        })
    }

    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        let found = self.env.iter().rev().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Where an HTTP component serves.
    pub(super) fn http_listen(&self, default: SocketAddr) -> Result<SocketAddr, PodError> {
        let Some(address) = self.variable(HTTP_LISTEN) else {
            return Ok(default);
        };
        address.parse().map_err(|_| {
            PodError::invalid(
                HTTP_LISTEN,
                address,
                "must be an address such as 0.0.0.0:8080",
            )
        })
    }
}

/// A mount of a spec, on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A folder or file.
    Bind(PathBuf),
    /// A new file system in memory, with these options.
    Memory(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) source: Source,
    pub(super) destination: String,
    pub(super) read_only: bool,
}

/// A container of a spec, with its files on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) process: Process,
    pub(super) root: PathBuf,
    pub(super) read_only: bool,
    pub(super) mounts: Vec<Mount>,
    pub(super) limits: Limits,
}

impl Spec {
    /// Reads a spec whose paths are those of a guest with its share at
    /// [`agent_api::SHARE_DIR`].
    pub(super) fn of(
        spec: &Value,
        share: &Path,
        settings: &config::Wasm,
    ) -> Result<Self, PodError> {
        let process = Process::of(spec.get("process").unwrap_or(&Value::Null))?;
        let root = spec.get("root").unwrap_or(&Value::Null);
        let path = text(root, "path");
        let host_root = on_host(path, share)
            .ok_or_else(|| PodError::invalid("root.path", path, "must lie in the pod's share"))?;
        let mut limits = Limits {
            wall_time: settings.wall_time,
            handles: process
                .files
                .unwrap_or(usize::MAX)
                .clamp(16, settings.max_handles),
            ..Limits::default()
        };
        let linux = spec.get("linux").and_then(|linux| linux.get("resources"));
        update(&mut limits, linux.unwrap_or(&Value::Null));
        let mounts = spec.get("mounts").and_then(Value::as_array);
        Ok(Self {
            root: host_root,
            read_only: root.get("readonly").and_then(Value::as_bool) == Some(true),
            mounts: mounts
                .into_iter()
                .flatten()
                .filter_map(|mount| Mount::of(mount, share))
                .collect(),
            process,
            limits,
        })
    }
}

impl Mount {
    fn of(mount: &Value, share: &Path) -> Option<Self> {
        let destination = text(mount, "destination");
        let options = strings(mount.get("options"));
        let is_bind =
            text(mount, "type") == "bind" || options.iter().any(|o| o == "bind" || o == "rbind");
        let system = SYSTEM
            .iter()
            .any(|&top| Path::new(destination).starts_with(top));
        if (system && !is_bind) || !destination.starts_with('/') {
            return None;
        }
        let source = match text(mount, "type") {
            _ if is_bind => Source::Bind(on_host(text(mount, "source"), share)?),
            "tmpfs" => {
                let data: Vec<_> = options
                    .iter()
                    .filter(|o| o.contains('='))
                    .cloned()
                    .collect();
                Source::Memory(data.join(","))
            }
            other => {
                warn!("a WebAssembly container has no {other} on {destination}");
                return None;
            }
        };
        Some(Self {
            source,
            destination: destination.to_owned(),
            read_only: options.iter().any(|o| o == "ro"),
        })
    }
}

/// Takes what OCI `LinuxResources` limit over.
pub(super) fn update(limits: &mut Limits, resources: &Value) {
    let number = |group: &str, key: &str| {
        resources
            .get(group)
            .and_then(|group| group.get(key))
            .and_then(Value::as_i64)
    };
    if let Some(memory) = number("memory", "limit") {
        limits.memory_bytes = u64::try_from(memory).ok().filter(|&bytes| bytes > 0);
    }
    if let Some(shares) = number("cpu", "shares").and_then(|shares| u64::try_from(shares).ok()) {
        limits.cpu_shares = shares;
    }
    let micros = |value: i64| {
        let micros = u64::try_from(value).ok().filter(|&micros| micros > 0)?;
        Some(Duration::from_micros(micros))
    };
    if let Some(quota) = number("cpu", "quota") {
        let period = number("cpu", "period").and_then(micros);
        let period = period.unwrap_or(Duration::from_millis(100));
        limits.cpu_quota = micros(quota).map(|quota| CpuQuota { quota, period });
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

fn strings(value: Option<&Value>) -> Vec<String> {
    value
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|value| value.as_str().map(str::to_owned))
        .collect()
}
