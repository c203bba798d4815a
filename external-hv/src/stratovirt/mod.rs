//! StratoVirt: started by command line, driven by QMP.
//!
//! | file | idea |
//! |---|---|
//! | `cid` | the guest's address on the host's vsock, the only one it has |
//! | `command` | the command line of a VM |
//! | `config` | what can be configured |
//! | `control` | a running StratoVirt: pause, hotplug |
//! | `kernel` | kernels as it takes them |

mod cid;
mod command;
mod config;
mod control;
mod kernel;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::Host;
use vmm_core::vm::VmError;

use self::cid::GuestCid;
use self::command::Opened;
pub use self::config::{MachineType, StratoConfig};
use self::control::StratoControl;
use self::kernel::Kernels;
use crate::capability::Backend;
use crate::hypervisor::{
    Control, HvError, Hypervisor, Launch, MachineSpec, Nic, Started, check_program,
};

/// Name for errors and `kuasar-ctl`.
pub const NAME: &str = "stratovirt";

/// Starts StratoVirts.
#[derive(Clone, Debug)]
pub struct StratoVirt {
    config: Arc<StratoConfig>,
    /// What guests need of their kernel on this host.
    parameters: Vec<String>,
    kernels: Arc<Kernels>,
    /// Whether guests have a vsock.
    vsock: bool,
}

impl StratoVirt {
    /// Checks the program and what it needs of the host.
    ///
    /// # Errors
    /// It cannot be run, there is no KVM, or the host's kernel has no vsock for guests.
    pub fn new(config: StratoConfig, host: &Result<Host, String>) -> Result<Self, HvError> {
        let strato = Self::without_vsock(config, host)?;
        GuestCid::claim()?;
        Ok(Self {
            vsock: true,
            ..strato
        })
    }

    /// The same for guests without an agent, which need no vsock.
    ///
    /// # Errors
    /// It cannot be run, or there is no KVM.
    pub fn without_vsock(
        config: StratoConfig,
        host: &Result<Host, String>,
    ) -> Result<Self, HvError> {
        check_program("hypervisor.stratovirt.path", &config.path)?;
        let host = host.as_ref().map_err(|why| HvError::Program {
            key: "hypervisor.stratovirt.path".to_owned(),
            path: config.path.clone(),
            why: why.clone(),
        })?;
        Ok(Self {
            parameters: crate::kernel_parameters(host),
            config: Arc::new(config),
            kernels: Arc::default(),
            vsock: false,
        })
    }
}

#[async_trait]
impl Hypervisor for StratoVirt {
    fn backend(&self) -> Backend {
        match self.config.machine {
            MachineType::Q35 => Backend::StratoVirt,
            MachineType::Microvm => Backend::StratoVirtMicrovm,
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn launch(&self, spec: &MachineSpec, nics: Vec<Nic>) -> Result<Launch, VmError> {
        let kernel = self.kernels.flat(&spec.kernel);
        let opened = Opened {
            kernel: kernel.map_err(|source| VmError::Io {
                what: format!("cannot boot the kernel {}", spec.kernel.display()),
                source,
            })?,
            vsock: self.vsock.then(GuestCid::claim).transpose()?,
            nics,
        };
        let config = &self.config;
        Ok(command::launch(config, &self.parameters, spec, opened))
    }

    async fn connect(
        &self,
        spec: &MachineSpec,
        started: Started,
    ) -> Result<Box<dyn Control>, VmError> {
        Ok(Box::new(StratoControl::connect(spec, started).await?))
    }
}
