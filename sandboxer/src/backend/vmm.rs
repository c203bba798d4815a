//! Pods in microVMs that run as threads of this process.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::vm::{Vm, VmError};

use super::{MachineRequest, SandboxBackend};
use crate::config::{Config, GuestFiles, MissingGuestFile};

/// Why this host cannot run microVMs.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// There is nothing to boot.
    #[error(transparent)]
    Guest(#[from] MissingGuestFile),
}

/// Makes microVMs inside this process.
#[derive(Debug)]
pub struct VmmBackend {
    guest: GuestFiles,
}

impl VmmBackend {
    /// Checks that this host can run microVMs.
    ///
    /// # Errors
    /// KVM cannot be used, or there is no guest to boot.
    pub async fn new(config: &Config) -> Result<Self, BackendError> {
        Ok(Self {
            guest: config.vm.guest_files()?,
        })
    }
}

#[async_trait]
impl SandboxBackend for VmmBackend {
    fn name(&self) -> &'static str {
        "in-process"
    }

    fn slow_kernel(&self) -> bool {
        false
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    async fn build(&self, _request: MachineRequest) -> Result<Arc<dyn Vm>, VmError> {
        Err(VmError::Unsupported {
            what: "build a VM",
            backend: self.name(),
        })
    }
}
