//! What can be configured.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Boards that QEMU emulates for us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where it runs guest kernels on the CPU, else QEMU's translator.
    #[default]
    Auto,
    /// KVM, even where it emulates guest kernels.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// How QEMU is started: `[hypervisor.qemu]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QemuConfig {
    /// The program.
    pub path: PathBuf,
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
    /// How many pieces memory can be plugged in.
    pub memory_slots: u32,
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
            machine: MachineType::Q35,
            machine_options: String::new(),
            accel: Accel::Auto,
            cpu: String::new(),
            cpu_features: String::new(),
            memory_slots: 8,
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
