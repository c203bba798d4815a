//! `[wasm]`: pods of WebAssembly programs, for `wasm-sandboxer`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use guest_image::Cache;
use serde::{Deserialize, Serialize};

use super::{ConfigError, wrong_in};

/// Folder of compiled programs in the cache of guest images.
const CACHE_DIR: &str = "wasm";
/// The key of what is in it, beside it.
const CACHE_KEY: &str = "wasm.key";

/// `[wasm]`: pods of WebAssembly programs, for `wasm-sandboxer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wasm {
    /// Who has a thread of its own. `pod`: each pod, whose containers take turns on it.
    /// `container`: each container.
    pub threads: WasmThreads,
    /// Whether these threads may only make the system calls that WebAssembly programs need.
    pub seccomp: bool,
    /// How much lower their priority is than the daemon's, 0 to 19, as for `nice(1)`.
    pub nice: i32,
    /// Where components of the world `wasi:http/proxy` serve in their pod's network, unless
    /// the environment of the container says otherwise in `WASMTIME_HTTP_PROXY_SOCKET_ADDR`.
    pub http_listen: SocketAddr,
    /// Most instances at once, 1 to 100000.
    pub max_instances: u32,
    /// Largest linear memory of one instance, 64 KiB to 4 GiB. Address space of that size is
    /// reserved for each instance.
    pub max_memory: ByteSize,
    /// Most linear memory of all containers together. Unset: three quarters of the host's
    /// memory.
    pub total_memory: Option<ByteSize>,
    /// Largest file that is taken for a program.
    pub max_program: ByteSize,
    /// Compiled programs kept in memory while no container runs them.
    pub keep_programs: usize,
    /// Most files, sockets and streams that one process has open; a lower `RLIMIT_NOFILE` of
    /// the container wins.
    pub max_handles: usize,
    /// How long a container may run. Unset: for ever.
    #[serde(with = "humantime_serde")]
    pub wall_time: Option<Duration>,
    /// Where compiled programs are kept for the next daemon. Unset: the folder `wasm` in the
    /// cache of guest images. The file beside it with the suffix `.key` authenticates them.
    pub cache_dir: Option<PathBuf>,
    /// Most bytes of compiled programs kept on disk; 0: none are.
    pub cache_size: ByteSize,
}

/// Who has a thread of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WasmThreads {
    /// Each pod.
    #[default]
    Pod,
    /// Each container.
    Container,
}

impl Default for Wasm {
    fn default() -> Self {
        Self {
            threads: WasmThreads::Pod,
            seccomp: true,
            nice: 5,
            http_listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)),
            max_instances: 4096,
            max_memory: ByteSize::gib(4),
            total_memory: None,
            max_program: ByteSize::mib(256),
            keep_programs: 64,
            max_handles: 4096,
            wall_time: None,
            cache_dir: None,
            cache_size: ByteSize::gib(1),
        }
    }
}

impl Wasm {
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = wrong_in(path);
        if !(1..=100_000).contains(&self.max_instances) {
            let value = self.max_instances.to_string();
            return wrong("wasm.max_instances", value, "must be 1 to 100000");
        }
        let memory = ByteSize::kib(64)..=ByteSize::gib(4);
        if !memory.contains(&self.max_memory) {
            let value = self.max_memory.to_string();
            return wrong("wasm.max_memory", value, "must be 64KiB to 4GiB");
        }
        if !(0..=19).contains(&self.nice) {
            return wrong("wasm.nice", self.nice.to_string(), "must be 0 to 19");
        }
        if self.max_handles < 16 {
            let value = self.max_handles.to_string();
            return wrong("wasm.max_handles", value, "must be at least 16");
        }
        Ok(())
    }

    /// Folder and key of compiled programs; none where they are not kept.
    ///
    /// # Errors
    /// The cache's own folder is not known.
    pub fn cache(&self) -> Result<Option<(PathBuf, PathBuf)>, guest_image::GuestError> {
        if self.cache_size.as_u64() == 0 {
            return Ok(None);
        }
        if let Some(dir) = &self.cache_dir {
            return Ok(Some((dir.clone(), dir.with_extension("key"))));
        }
        let cache = Cache::locate()?;
        Ok(Some((
            cache.root().join(CACHE_DIR),
            cache.root().join(CACHE_KEY),
        )))
    }
}
