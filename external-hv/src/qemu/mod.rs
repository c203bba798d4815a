//! QEMU: started by command line, driven by QMP.
//!
//! | file | idea |
//! |---|---|
//! | `command` | the command line of a VM |
//! | `control` | a running QEMU: pause, hotplug, size |

mod command;
mod control;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::Host;
use vmm_core::vm::VmError;

use self::control::QemuControl;
use crate::hypervisor::{
    Control, HvError, Hypervisor, Launch, MachineSpec, Nic, Started, check_program,
};

/// Name for errors and `kuasar-ctl`.
pub const NAME: &str = "qemu";

/// Boards that QEMU emulates for us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MachineType {
    /// A PC with PCI Express; devices are plugged into root ports.
    #[default]
    Q35,
    /// A PC with PCI.
    Pc,
    /// A PC without PCI: virtio-mmio, no hotplug.
    Microvm,
    /// The board of arm64.
    Virt,
}

impl MachineType {
    /// As on QEMU's command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
            Self::Microvm => "microvm",
            Self::Virt => "virt",
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// KVM where it runs guest kernels on the CPU, else QEMU's translator.
    #[default]
    Auto,
    /// KVM, even where it emulates guest kernels.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// How QEMU is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuConfig {
    /// The program.
    pub path: PathBuf,
    /// The configuration key that names it, for errors.
    pub path_key: String,
    /// The board.
    pub machine: MachineType,
    /// Appended to `-machine`: options separated by commas.
    pub machine_options: String,
    /// What runs the guest.
    pub accel: Accel,
    /// CPU model; empty: what suits `accel`.
    pub cpu: String,
    /// CPU features separated by commas, appended to the model.
    pub cpu_features: String,
    /// Most vCPUs after hotplug; 0: those at boot.
    pub max_vcpus: u32,
    /// Most memory in bytes after hotplug; 0: that at boot.
    pub max_memory_bytes: u64,
    /// How many pieces memory can be plugged in, with `max_memory_bytes`.
    pub memory_slots: u32,
    /// Devices that can be plugged in while the VM runs.
    pub hotplug_slots: u32,
    /// Guest memory in huge pages.
    pub hugepages: bool,
    /// Allocate all guest memory at start.
    pub prealloc: bool,
    /// Folder for a file that backs guest memory, instead of memory without a name.
    pub memory_path: Option<PathBuf>,
    /// Firmware to load instead of QEMU's own.
    pub firmware: Option<PathBuf>,
    /// Root file system image, as first disk.
    pub image: Option<PathBuf>,
    /// Where the guest's entropy comes from.
    pub entropy_source: PathBuf,
    /// A thread of their own for disks.
    pub iothread: bool,
    /// Let the host refuse memory beyond what it has, rather than swap.
    pub lock_memory: bool,
    /// QEMU's own system call filter.
    pub seccomp: bool,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            path_key: "hypervisor.qemu.path".to_owned(),
            machine: MachineType::Q35,
            machine_options: String::new(),
            accel: Accel::Auto,
            cpu: String::new(),
            cpu_features: String::new(),
            max_vcpus: 0,
            max_memory_bytes: 0,
            memory_slots: 8,
            hotplug_slots: 4,
            hugepages: false,
            prealloc: false,
            memory_path: None,
            firmware: None,
            image: None,
            entropy_source: PathBuf::from("/dev/urandom"),
            iothread: false,
            lock_memory: false,
            seccomp: true,
        }
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
        check_program(&config.path_key, &config.path)?;
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
