//! The daemon's configuration file.
//!
//! One struct per TOML table; the doc comment of a field is the documentation of its key.
//! A key this version does not know is an error that names the nearest one it does.

mod hypervisor;
mod keys;
mod kuasar;
mod quark;
mod templates;
mod vm;
mod wasm;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use hypervisor::accel;
pub use hypervisor::{Hypervisor, HypervisorKind};
pub use quark::{Quark, QuarkNodeError};
pub use templates::{TemplateMode, Templates};
pub(crate) use vm::{DEBUG_SHELL, MIN_MEMORY};
pub use vm::{DeviceDiscovery, Fs, FsCache, GuestFiles, MissingGuestFile, Vm};
pub use wasm::{Wasm, WasmThreads};

/// Where the daemon looks when no `--config` is given; the file may be absent.
pub const DEFAULT_PATH: &str = "/var/lib/kuasar/config.toml";

/// What the daemon runs with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The daemon itself.
    pub sandbox: Sandbox,
    /// The virtual machine of each pod.
    pub vm: Vm,
    /// The external hypervisor, when `sandbox.mode` is `external`.
    pub hypervisor: Hypervisor,
    /// Pods as clones of a guest that has booted once.
    pub templates: Templates,
    /// The file system shared between host and guest.
    pub fs: Fs,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// Who is told what happens to containers.
    pub events: Events,
    /// Pods of WebAssembly programs.
    pub wasm: Wasm,
    /// Pods in Quark.
    pub quark: Quark,
    /// What a file of Kuasar says that has no effect here, to be logged.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// `[sandbox]`: the daemon itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sandbox {
    /// Least severe messages to log: `error`, `warn`, `info`, `debug`, `trace`, or
    /// directives such as `info,vmm_core=debug`. `RUST_LOG` and `--log-level` override it.
    pub log_level: String,
    /// Who runs the VMs. `in-process`: threads of this daemon. `external`: processes of the
    /// hypervisor that `hypervisor.kind` names. `--mode` overrides it.
    pub mode: Mode,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            log_level: "info".to_owned(),
            mode: Mode::InProcess,
        }
    }
}

/// Who runs the VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Threads of this daemon.
    #[default]
    #[value(name = "in-process")]
    InProcess,
    /// Processes of an external hypervisor.
    External,
}

/// What the command line has instead of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Overrides {
    /// Who runs the VMs [default: as configured, else in-process]
    #[arg(long, value_name = "MODE", env = "KUASAR_MODE")]
    pub mode: Option<Mode>,
    /// The hypervisor of `--mode external` [default: as configured, else qemu]
    #[arg(long, value_name = "NAME", env = "KUASAR_HYPERVISOR")]
    pub hypervisor: Option<HypervisorKind>,
    /// Its program [default: as configured, else where packages install it]
    #[arg(long, value_name = "FILE", env = "KUASAR_HYPERVISOR_PATH")]
    pub hypervisor_path: Option<PathBuf>,
}

impl Overrides {
    /// Changes what was read from the file.
    pub fn apply(self, config: &mut Config) {
        config.sandbox.mode = self.mode.unwrap_or(config.sandbox.mode);
        let hypervisor = &mut config.hypervisor;
        hypervisor.kind = self.hypervisor.unwrap_or(hypervisor.kind);
        let path = match hypervisor.kind {
            HypervisorKind::Qemu => &mut hypervisor.qemu.path,
            HypervisorKind::CloudHypervisor => &mut hypervisor.cloud_hypervisor.path,
            HypervisorKind::StratoVirt => &mut hypervisor.stratovirt.path,
        };
        if let Some(wanted) = self.hypervisor_path {
            *path = wanted;
        }
    }
}

/// `[events]`: who is told what happens to containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Events {
    /// containerd's ttrpc socket, usually `/run/containerd/containerd.sock.ttrpc`. Set it
    /// for Kubernetes to see which containers were killed for want of memory, and for
    /// `ctr events`. Unset: nobody is told, as iSulad wants it.
    pub containerd: Option<PathBuf>,
}

/// `[timeouts]`: how long to wait for what, written like `"10s"` or `"500ms"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timeouts {
    /// From starting the vCPUs to the agent's first message.
    #[serde(with = "humantime_serde")]
    pub boot: Duration,
    /// One call to the agent.
    #[serde(with = "humantime_serde")]
    pub agent_call: Duration,
    /// Opening one byte stream to the guest.
    #[serde(with = "humantime_serde")]
    pub connect: Duration,
    /// Stopping a pod: first the agent is asked to flush and power off, then the VM is
    /// ended. Used when the caller names no time of its own.
    #[serde(with = "humantime_serde")]
    pub stop: Duration,
    /// How long the output of an exited process may stay silent before its streams are
    /// closed although a left-over child still holds them.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// What every time above is multiplied by on hosts whose KVM emulates guest ring 0,
    /// where a guest kernel runs about a thousand times slower.
    pub slow_host_factor: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(30),
            agent_call: Duration::from_secs(10),
            connect: Duration::from_secs(5),
            stop: Duration::from_secs(5),
            drain: Duration::from_secs(2),
            slow_host_factor: 10,
        }
    }
}

impl Timeouts {
    /// These times as they apply on a host that emulates guest ring 0.
    #[must_use]
    pub fn for_slow_host(&self) -> Self {
        let factor = self.slow_host_factor.max(1);
        Self {
            boot: self.boot.saturating_mul(factor),
            agent_call: self.agent_call.saturating_mul(factor),
            connect: self.connect.saturating_mul(factor),
            stop: self.stop.saturating_mul(factor),
            drain: self.drain.saturating_mul(factor),
            slow_host_factor: factor,
        }
    }
}

/// Why a configuration cannot be used. The message names the file, the key and the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A key that does not exist.
    #[error("{path}: unknown key `{key}`{hint}", hint = nearest_hint(.nearest.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key with its table, as in `vm.memroy`.
        key: String,
        /// The most similar key that exists, if one is similar.
        nearest: Option<String>,
    },
    /// A value outside its range.
    #[error("{path}: {key} = {value}: {fix}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key with its table.
        key: &'static str,
        /// The value found.
        value: String,
        /// What it must be.
        fix: &'static str,
    },
}

/// Makes the error about a value of the file `path`: its key, itself, and what it must be.
fn wrong_in(path: &Path) -> impl Fn(&'static str, String, &'static str) -> Result<(), ConfigError> {
    move |key, value, fix| {
        Err(ConfigError::Value {
            path: path.to_owned(),
            key,
            value,
            fix,
        })
    }
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(
        || "; see docs/configuration.md for the keys that exist".to_owned(),
        |key| format!("; did you mean `{key}`?"),
    )
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] when there is none; only the default file may be
    /// absent.
    ///
    /// # Errors
    /// The file is unreadable, is not valid TOML, or has an unknown key or a value out of
    /// range.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text, file),
            Err(e) if e.kind() == ErrorKind::NotFound && path.is_none() => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: file.to_owned(),
                source,
            }),
        }
    }

    /// Parses `text`; `path` is only named in errors.
    ///
    /// # Errors
    /// As for [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let parse_error = |source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        };
        if kuasar::is_one(text) {
            return kuasar::parse(text, path);
        }
        let document = toml::Deserializer::parse(text).map_err(parse_error)?;
        let mut unknown = None;
        let mut config: Self = serde_ignored::deserialize(document, |key| {
            unknown.get_or_insert_with(|| key.to_string());
        })
        .map_err(parse_error)?;
        if let Some(key) = unknown {
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                nearest: keys::nearest(&key),
                key,
            });
        }
        config.check(path)?;
        config.vm.announce_debug_console();
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        self.vm.check(path)?;
        self.fs.check(path)?;
        self.templates.check(path)?;
        self.hypervisor.check(path)?;
        self.wasm.check(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/k.toml"))
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn keys_change_what_they_name() {
        let config = parse(
            "[sandbox]\nlog_level = 'debug'\nmode = 'in-process'\n\
             [vm]\nvcpus = 3\nmemory = '1GiB'\nkernel_params = 'quiet'\ndiscovery = 'command-line'\n\
             [timeouts]\nboot = '7s'\nslow_host_factor = 3",
        )
        .unwrap();
        assert_eq!(config.sandbox.log_level, "debug");
        assert_eq!(config.vm.vcpus, 3);
        assert_eq!(config.vm.memory.as_u64(), 1 << 30);
        assert_eq!(config.vm.kernel_params, "quiet");
        assert_eq!(config.vm.discovery, DeviceDiscovery::CommandLine);
        assert_eq!(config.timeouts.boot, Duration::from_secs(7));
        assert_eq!(
            config.timeouts.for_slow_host().boot,
            Duration::from_secs(21)
        );
    }

    #[test]
    fn an_unknown_key_names_the_nearest_one() {
        for (text, message) in [
            (
                "[vm]\nmemroy = '1GiB'",
                "/etc/k.toml: unknown key `vm.memroy`; did you mean `vm.memory`?",
            ),
            (
                "[timeout]\nboot = '1s'",
                "/etc/k.toml: unknown key `timeout`; did you mean `timeouts`?",
            ),
            (
                "[vm]\nbootloader = 'x'",
                "/etc/k.toml: unknown key `vm.bootloader`; see docs/configuration.md \
                 for the keys that exist",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn wrong_values_name_key_and_fix() {
        for (text, part) in [
            ("[vm]\nvcpus = 0", "vm.vcpus = 0: "),
            ("[vm]\nmemory = '1MiB'", "vm.memory = "),
            ("[fs]\nworkers = 0", "fs.workers = 0: "),
            ("[fs]\ndax = '3MiB'", "fs.dax = "),
            ("[fs]\ndax = '32GiB'", "fs.dax = "),
            ("[templates]\nkeep = 0", "templates.keep = 0: "),
            ("[templates]\nwarm = 1000", "templates.warm = 1000: "),
            ("[templates]\nshells = 257", "templates.shells = 257: "),
            ("[templates]\nmode = 'on'", "on"),
            ("[wasm]\nmax_instances = 0", "wasm.max_instances = 0: "),
            ("[wasm]\nmax_memory = '8GiB'", "wasm.max_memory = "),
            ("[wasm]\nnice = 20", "wasm.nice = 20: "),
            ("[wasm]\nmax_handles = 1", "wasm.max_handles = 1: "),
            ("[wasm]\nhttp_listen = 'x'", "http_listen"),
            ("[vm]\nmemory = 'lots'", "memory"),
            ("[sandbox]\nmode = 'magic'", "magic"),
            ("[timeouts]\nboot = 5", "boot"),
            ("vm = [", "/etc/k.toml"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn only_the_default_file_may_be_absent() {
        let missing = Path::new("/nonexistent/config.toml");
        let error = Config::load(Some(missing)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/config.toml"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default());
    }
}
