//! Kuasar's own configuration files, unchanged.
//!
//! They have the keys of one hypervisor flat in `[hypervisor]`, which tells them from ours, and
//! select the external mode with it. A key either changes the launch or is named in
//! [`Config::warnings`]; one that no such file has is an error.

mod clh;
mod qemu;
mod stratovirt;

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_aux::serde_introspection::serde_introspect;
use toml::Table;

use super::{Config, ConfigError, FsCache, Mode, keys};

/// Keys of `[hypervisor]` that only our own files have.
const OURS: [&str; 6] = [
    "kind",
    "supervisor",
    "api_timeout",
    "qemu",
    "cloud-hypervisor",
    "stratovirt",
];

/// Whether `text` is a configuration file of Kuasar.
pub(super) fn is_one(text: &str) -> bool {
    let Ok(document) = text.parse::<Table>() else {
        return false;
    };
    let hypervisor = document.get("hypervisor").and_then(toml::Value::as_table);
    hypervisor.is_some_and(|keys| {
        !keys.keys().any(|key| OURS.contains(&key.as_str()))
            && FLAT.iter().any(|key| keys.contains_key(*key))
    })
}

/// Keys of `[hypervisor]` in every file of Kuasar, one of which tells it.
const FLAT: [&str; 9] = [
    "path",
    "qemu_path",
    "memory_in_mb",
    "vcpus",
    "kernel_path",
    "image_path",
    "initrd_path",
    "kernel_params",
    "machine_type",
];

/// Parses a file of which [`is_one`] is true; `path` is only named in errors.
pub(super) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let document = text.parse::<Table>().map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let hypervisor = document.get("hypervisor").and_then(toml::Value::as_table);
    let has = |key: &str| hypervisor.is_some_and(|keys| keys.contains_key(key));
    let program = hypervisor.and_then(|keys| keys.get("path")?.as_str());
    let is_stratovirt = has("virtiofsd_conf")
        || has("machine_type") && has("path")
        || program.is_some_and(|path| path.contains("stratovirt"));
    let config = if is_stratovirt {
        stratovirt::config(read(text, path)?)
    } else if has("qemu_path") || has("machine_type") {
        qemu::config(read(text, path)?)
    } else {
        clh::config(read(text, path)?)
    };
    config.check(path)?;
    Ok(config)
}

/// A file of Kuasar with `H` as its `[hypervisor]`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File<H> {
    sandbox: Sandbox,
    hypervisor: H,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sandbox {
    log_level: Option<String>,
    enable_tracing: bool,
}

/// `[hypervisor.virtiofsd]`, or `virtiofsd_conf` for StratoVirt: of the daemon whose place our own device takes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Virtiofsd {
    path: Option<String>,
    log_level: Option<String>,
    cache: Option<String>,
    thread_pool_size: Option<u16>,
    syslog: Option<bool>,
    socket_path: Option<String>,
    shared_dir: Option<String>,
}

/// `[hypervisor.task]`: of the agent.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Task {
    debug: bool,
    enable_tracing: bool,
}

fn read<H: DeserializeOwned + Default + 'static>(
    text: &str,
    path: &Path,
) -> Result<File<H>, ConfigError> {
    let parse_error = |source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let document = toml::Deserializer::parse(text).map_err(parse_error)?;
    let mut unknown = None;
    let file = serde_ignored::deserialize(document, |key| {
        unknown.get_or_insert_with(|| key.to_string());
    })
    .map_err(parse_error)?;
    match unknown {
        None => Ok(file),
        Some(key) => Err(ConfigError::UnknownKey {
            path: path.to_owned(),
            nearest: nearest::<H>(&key),
            key,
        }),
    }
}

/// The key of the same table that is most similar.
fn nearest<H: DeserializeOwned>(key: &str) -> Option<String> {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let known: &[&str] = match table {
        "" => &["sandbox", "hypervisor"],
        "sandbox" => serde_introspect::<Sandbox>(),
        "hypervisor" => serde_introspect::<H>(),
        "hypervisor.virtiofsd" | "hypervisor.virtiofsd_conf" => serde_introspect::<Virtiofsd>(),
        "hypervisor.task" => serde_introspect::<Task>(),
        _ => &[],
    };
    let (edits, found) = keys::similar(name, known)?;
    (edits <= 3.min(name.len() / 2)).then(|| match table {
        "" => found.to_owned(),
        _ => format!("{table}.{found}"),
    })
}

/// What all files have in common, on its way into a [`Config`].
#[derive(Debug, Default)]
struct Common {
    vcpus: Option<u32>,
    memory_in_mb: Option<u64>,
    kernel_path: Option<String>,
    initrd_path: Option<String>,
    kernel_params: Option<String>,
    debug: bool,
}

/// Builds a [`Config`] and notes what has no effect.
#[derive(Debug, Default)]
struct Translation {
    config: Config,
}

impl Translation {
    fn new(sandbox: Sandbox, common: Common) -> Self {
        let mut translation = Self::default();
        let config = &mut translation.config;
        config.sandbox.mode = Mode::External;
        if let Some(level) = sandbox.log_level.filter(|level| !level.is_empty()) {
            config.sandbox.log_level = level;
        }
        config.vm.vcpus = common.vcpus.unwrap_or(config.vm.vcpus);
        if let Some(megabytes) = common.memory_in_mb {
            config.vm.memory = ByteSize::mib(megabytes);
        }
        config.vm.kernel = file(common.kernel_path);
        config.vm.initramfs = file(common.initrd_path);
        config.vm.kernel_params = common.kernel_params.unwrap_or_default();
        if common.debug {
            translation.parameter("task.log_level=debug");
        }
        translation.no_effect(
            sandbox.enable_tracing,
            "sandbox.enable_tracing",
            "there is no tracing",
        );
        translation
    }

    /// Appends a kernel parameter.
    fn parameter(&mut self, word: &str) {
        let line = &mut self.config.vm.kernel_params;
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }

    /// Notes a key that is set in vain.
    fn no_effect(&mut self, set: bool, key: &str, why: &str) {
        if set {
            let warning = format!("{key} has no effect: {why}");
            self.config.warnings.push(warning);
        }
    }

    fn virtiofsd(&mut self, table: &str, daemon: &Virtiofsd) {
        let ours = "virtio-fs is served by this daemon's own device";
        for (set, key) in [
            (daemon.path.is_some(), "path"),
            (daemon.log_level.is_some(), "log_level"),
            (daemon.syslog.is_some(), "syslog"),
            (daemon.socket_path.is_some(), "socket_path"),
            (daemon.shared_dir.is_some(), "shared_dir"),
        ] {
            self.no_effect(set, &format!("{table}.{key}"), ours);
        }
        if let Some(threads) = daemon.thread_pool_size {
            self.config.fs.workers = threads.max(1);
        }
        self.cache(daemon.cache.as_deref(), &format!("{table}.cache"));
    }

    fn cache(&mut self, cache: Option<&str>, key: &str) {
        match cache {
            None | Some("") => {}
            Some("never" | "none") => self.config.fs.cache = FsCache::Never,
            Some("auto") => self.config.fs.cache = FsCache::Auto,
            Some("always") => self.config.fs.cache = FsCache::Always,
            Some(other) => {
                let why = format!("{other:?} is none of never, auto, always");
                self.no_effect(true, key, &why);
            }
        }
    }

    fn task(&mut self, task: &Task) {
        if task.debug {
            self.parameter("task.debug");
        }
        self.no_effect(
            task.enable_tracing,
            "hypervisor.task.enable_tracing",
            "there is no tracing",
        );
    }
}

/// A path, unless it is empty.
fn file(text: Option<String>) -> Option<PathBuf> {
    text.filter(|text| !text.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests;
