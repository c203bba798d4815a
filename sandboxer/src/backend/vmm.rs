//! Pods in microVMs that run as threads of this process.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use async_trait::async_trait;
use devices::virtio::fs::{CachePolicy, Fs, FsConfig};
use devices::virtio::vsock::VsockConfig;
use vmm_core::host::HostError;
use vmm_core::vm::{Vm, VmError};
use vmm_core::{Host, Machine, MachineConfig};

use super::{MachineRequest, SandboxBackend};
use crate::config::{self, Config, FsCache, GuestFiles, MissingGuestFile};

/// Address of every guest; nothing is routed by it.
const GUEST_CID: u32 = 3;

/// Longest name of a machine.
const MAX_NAME_BYTES: usize = 64;

/// Name of the console log in the pod's folder.
const CONSOLE_LOG: &str = "console.log";

/// Name of the socket for `CONNECT` clients in the pod's folder.
const VSOCK_SOCKET: &str = "vsock.sock";

/// Why this host cannot run microVMs.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// KVM cannot be used.
    #[error("this host cannot run microVMs: {0}")]
    Host(#[from] HostError),
    /// There is nothing to boot.
    #[error(transparent)]
    Guest(#[from] MissingGuestFile),
}

/// Makes microVMs inside this process.
#[derive(Debug)]
pub struct VmmBackend {
    host: Host,
    guest: GuestFiles,
    vm: config::Vm,
    fs: config::Fs,
}

impl VmmBackend {
    /// Checks that this host can run microVMs.
    ///
    /// # Errors
    /// KVM cannot be used, or there is no guest to boot.
    pub async fn new(config: &Config) -> Result<Self, BackendError> {
        // The probe runs a throw-away VM.
        let host = tokio::task::spawn_blocking(Host::probe)
            .await
            .map_err(|e| HostError::Probe(e.to_string()))??;
        let guest = config.vm.guest_files()?;
        Ok(Self {
            host,
            guest,
            vm: config.vm.clone(),
            fs: config.fs.clone(),
        })
    }

    fn machine_config(&self, request: &MachineRequest) -> Result<MachineConfig, VmError> {
        let mut share = FsConfig::new(agent_api::SHARE_TAG, request.share.clone());
        share.workers = self.fs.workers;
        share.cache = match self.fs.cache {
            FsCache::Never => CachePolicy::Never,
            FsCache::Auto => CachePolicy::Auto,
            FsCache::Always => CachePolicy::Always,
        };
        let share = Fs::new(share).map_err(backend_error)?;
        let mut vsock = VsockConfig::new(GUEST_CID);
        vsock.uds_path = self.vm.vsock_uds.then(|| request.dir.join(VSOCK_SOCKET));
        let mut machine = MachineConfig::new(machine_name(&request.pod), &self.guest.kernel);
        machine.vcpus = request.vcpus;
        machine.memory_bytes = request.memory_bytes;
        machine.initramfs = Some(self.guest.initramfs.clone());
        machine.cmdline.clone_from(&self.vm.kernel_params);
        machine.console.path = Some(request.dir.join(CONSOLE_LOG));
        machine.console.cap_bytes = self.vm.serial_log_bytes.as_u64();
        machine
            .with_device("share", Box::new(share))
            .with_rng()
            .map_err(io_error("opening the entropy device"))?
            .with_vsock(vsock)
            .map_err(io_error("making the vsock device"))
    }
}

#[async_trait]
impl SandboxBackend for VmmBackend {
    fn name(&self) -> &'static str {
        "in-process"
    }

    fn slow_kernel(&self) -> bool {
        self.host.emulated_ring0()
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        self.host
            .guest_environment()
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    async fn build(&self, request: MachineRequest) -> Result<Arc<dyn Vm>, VmError> {
        let config = self.machine_config(&request)?;
        let host = self.host.clone();
        let machine = tokio::task::spawn_blocking(move || Machine::build(&host, config))
            .await
            .map_err(backend_error)?
            .map_err(backend_error)?;
        Ok(Arc::new(machine))
    }
}

/// The pod's id as far as a machine's name can hold it.
fn machine_name(pod: &str) -> String {
    pod.chars()
        .map(|c| if c == '+' { '_' } else { c })
        .take(MAX_NAME_BYTES)
        .collect()
}

fn backend_error(error: impl Error + Send + Sync + 'static) -> VmError {
    VmError::Backend(Box::new(error))
}

fn io_error(what: &str) -> impl FnOnce(std::io::Error) -> VmError {
    let what = what.to_owned();
    move |source| VmError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_pods_become_names_of_machines() {
        assert_eq!(machine_name("a+b.c_d-e"), "a_b.c_d-e");
        assert_eq!(machine_name(&"x".repeat(200)).len(), MAX_NAME_BYTES);
    }
}
