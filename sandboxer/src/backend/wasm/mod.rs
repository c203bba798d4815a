//! Pods of WebAssembly programs, which run in this process.
//!
//! There is no machine: [`machine`] gives the pod its beginning and end, [`agent`] runs its
//! containers on [`wasm_host`]. A container's files are where they are for any pod, below its
//! share; [`spec`] reads what an OCI spec grants, [`files`] makes folders and files of it.

mod agent;
mod container;
mod files;
mod machine;
mod spec;
#[cfg(test)]
mod tests;
mod tty;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use async_trait::async_trait;
use vmm_core::vm::{Vm, VmError};
use wasm_host::{CacheConfig, Host, HostConfig, WasmError};

use self::agent::WasmPod;
use self::machine::WasmMachine;
use super::{Built, Connecting, MachineRequest, SandboxBackend};
use crate::agent::{AgentError, Limits};
use crate::config;

/// Name of this backend.
const NAME: &str = "wasm";

/// Why this host cannot run WebAssembly pods.
#[derive(Debug, thiserror::Error)]
pub enum WasmBackendError {
    /// The engine cannot start.
    #[error(transparent)]
    Engine(#[from] WasmError),
    /// There is no place for compiled programs.
    #[error(transparent)]
    Cache(#[from] guest_image::GuestError),
}

/// Makes pods of WebAssembly programs.
#[derive(Debug)]
pub struct WasmBackend {
    host: Host,
    settings: Arc<config::Wasm>,
    /// Pods that were built, until their agent is asked for.
    pods: Mutex<HashMap<String, Weak<WasmPod>>>,
}

impl WasmBackend {
    /// Starts the engine. Blocks.
    ///
    /// # Errors
    /// This host has not the address space, or the cache cannot be used.
    pub fn new(settings: config::Wasm) -> Result<Self, WasmBackendError> {
        let cache = settings.cache()?.map(|(dir, key)| CacheConfig {
            dir,
            key,
            max_bytes: settings.cache_size.as_u64(),
        });
        let total = settings
            .total_memory
            .map_or_else(most_of_the_host, |total| total.as_u64());
        let host = Host::new(HostConfig {
            max_instances: settings.max_instances,
            max_memory_bytes: settings.max_memory.as_u64(),
            total_memory_bytes: total,
            max_program_bytes: settings.max_program.as_u64(),
            keep_programs: settings.keep_programs,
            cache,
            ..HostConfig::default()
        })?;
        Ok(Self {
            host,
            settings: Arc::new(settings),
            pods: Mutex::default(),
        })
    }
}

/// Three quarters of the host's memory, in bytes.
fn most_of_the_host() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total() / 4 * 3)
}

#[async_trait]
impl SandboxBackend for WasmBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slow_kernel(&self) -> bool {
        false
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn enters_namespace(&self) -> bool {
        true
    }

    async fn build(&self, request: MachineRequest) -> Result<Built, VmError> {
        let id = request.pod.clone();
        let (host, settings) = (self.host.clone(), Arc::clone(&self.settings));
        // Starts a thread, in the pod's namespace.
        let made = tokio::task::spawn_blocking(move || WasmPod::new(host, settings, request));
        let pod = made
            .await
            .map_err(|e| VmError::Backend(Box::new(e)))?
            .map_err(|e| VmError::Backend(Box::new(e)))?;
        let mut pods = lock(&self.pods);
        pods.retain(|_, pod| pod.strong_count() > 0);
        pods.insert(id, Arc::downgrade(&pod));
        Ok(Arc::new(WasmMachine::new(pod)).into())
    }

    fn agent(&self, pod: &str, _vm: &dyn Vm, _limits: Limits) -> Result<Connecting, VmError> {
        let pod = lock(&self.pods).remove(pod).and_then(|pod| pod.upgrade());
        Ok(Box::pin(async move {
            let gone = || AgentError::Disconnected {
                call: "start",
                reason: "the pod has ended".to_owned(),
            };
            pod.and_then(WasmPod::connect).ok_or_else(gone)
        }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
