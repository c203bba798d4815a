//! QEMU: started by command line, driven by QMP.
//!
//! | file | idea |
//! |---|---|
//! | `command` | the command line of a VM |
//! | `config` | what can be configured |
//! | `control` | a running QEMU: pause, hotplug, size |

mod command;
mod config;
mod control;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::Host;
use vmm_core::vm::VmError;

pub use self::config::{Accel, MachineType, QemuConfig};
use self::control::QemuControl;
use crate::capability::Backend;
use crate::hypervisor::{
    Control, HvError, Hypervisor, Launch, MachineSpec, Nic, Started, check_program,
};

/// Name for errors and `kuasar-ctl`.
pub const NAME: &str = "qemu";

/// How many devices can be plugged in while the VM runs, each into a root port; 0 where they
/// need none.
fn root_ports(machine: MachineType, spec: &MachineSpec) -> u32 {
    match machine {
        MachineType::Q35 | MachineType::Virt => spec.net_slots.saturating_add(spec.disk_slots),
        MachineType::Pc | MachineType::Microvm => 0,
    }
}

/// Starts QEMUs.
#[derive(Clone, Debug)]
pub struct Qemu {
    config: Arc<QemuConfig>,
    engine: Engine,
}

/// What runs the guest, once that is settled.
#[derive(Clone, Debug)]
pub(crate) enum Engine {
    /// KVM, with what this host needs of guests.
    Kvm {
        emulated_ring0: bool,
        parameters: Vec<String>,
    },
    /// QEMU's translator.
    Tcg,
}

impl Qemu {
    /// Checks the program and settles what runs guests; `host` is what KVM can do here. The
    /// text says why guests are slower than they could be, if so.
    ///
    /// # Errors
    /// The program cannot be run, or KVM is wanted and cannot be used.
    pub fn new(
        config: QemuConfig,
        host: &Result<Host, String>,
    ) -> Result<(Self, Option<String>), HvError> {
        check_program("hypervisor.qemu.path", &config.path)?;
        let kvm = |host: &Host| Engine::Kvm {
            emulated_ring0: host.emulated_ring0(),
            parameters: crate::kernel_parameters(host),
        };
        let (engine, notice) = match (config.accel, host) {
            (Accel::Tcg, _) => (Engine::Tcg, None),
            (Accel::Kvm, Ok(host)) => (kvm(host), None),
            (Accel::Kvm, Err(why)) => {
                return Err(HvError::Program {
                    key: "hypervisor.qemu.accel".to_owned(),
                    path: PathBuf::from("kvm"),
                    why: format!("{why}; use \"tcg\" or \"auto\""),
                });
            }
            (Accel::Auto, Ok(host)) if !host.emulated_ring0() => (kvm(host), None),
            (Accel::Auto, Ok(_)) => (
                Engine::Tcg,
                Some(
                    "this host's KVM emulates guest kernels: QEMU translates guests itself \
                     (TCG), programs in them run slower than on KVM"
                        .to_owned(),
                ),
            ),
            (Accel::Auto, Err(why)) => (
                Engine::Tcg,
                Some(format!(
                    "no KVM ({why}): QEMU translates guests itself (TCG), which is slow"
                )),
            ),
        };
        let qemu = Self {
            config: Arc::new(config),
            engine,
        };
        Ok((qemu, notice))
    }

    /// Whether QEMU translates guests, so that their programs run slower than on the CPU.
    #[must_use]
    pub fn translates(&self) -> bool {
        matches!(self.engine, Engine::Tcg)
    }

    /// Whether guests run on a KVM that emulates their kernels.
    #[must_use]
    pub fn emulated_ring0(&self) -> bool {
        matches!(
            self.engine,
            Engine::Kvm {
                emulated_ring0: true,
                ..
            }
        )
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn backend(&self) -> Backend {
        match self.config.machine {
            MachineType::Microvm => Backend::QemuMicrovm,
            MachineType::Q35 | MachineType::Pc | MachineType::Virt => Backend::Qemu,
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn launch(&self, spec: &MachineSpec, nics: Vec<Nic>) -> Result<Launch, VmError> {
        command::launch(&self.config, &self.engine, spec, nics)
    }

    async fn connect(&self, spec: &MachineSpec, _: Started) -> Result<Box<dyn Control>, VmError> {
        let control = QemuControl::connect(Arc::clone(&self.config), spec).await?;
        Ok(Box::new(control))
    }
}
