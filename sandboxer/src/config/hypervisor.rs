//! `[hypervisor]`: the external hypervisor that runs pods when `sandbox.mode` is `external`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use external_hv::cloud_hypervisor::ChConfig;
use external_hv::qemu::{self, QemuConfig};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// `[hypervisor]`: which one, and what is common to all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hypervisor {
    /// Which hypervisor. `--hypervisor` overrides it.
    pub kind: HypervisorKind,
    /// The program beside each VM that serves it our devices; unset: `kuasar-vmm-supervisor`
    /// in the folder of the running program.
    pub supervisor: Option<PathBuf>,
    /// Longest wait for one answer of the hypervisor.
    #[serde(with = "humantime_serde")]
    pub api_timeout: Duration,
    /// QEMU.
    pub qemu: Qemu,
    /// Cloud Hypervisor.
    #[serde(rename = "cloud-hypervisor")]
    pub cloud_hypervisor: CloudHypervisor,
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            kind: HypervisorKind::default(),
            supervisor: None,
            api_timeout: Duration::from_secs(10),
            qemu: Qemu::default(),
            cloud_hypervisor: CloudHypervisor::default(),
        }
    }
}

/// An external hypervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HypervisorKind {
    /// QEMU.
    #[default]
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

/// `[hypervisor.qemu]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Qemu {
    /// The program.
    pub path: PathBuf,
    /// The board: `q35`, `pc`, `microvm` (no hotplug) or `virt` (arm64).
    pub machine: MachineType,
    /// Appended to QEMU's `-machine`, options separated by commas.
    pub machine_options: String,
    /// What runs guests: `kvm`, `tcg` (QEMU translates them), or `auto`: KVM where it runs
    /// guest kernels on the CPU, else `tcg`. `KUASAR_QEMU_ACCEL` overrides it.
    pub accel: Accel,
    /// CPU model; empty: `host` with KVM, `max` without.
    pub cpu: String,
    /// CPU features separated by commas, appended to the model.
    pub cpu_features: String,
    /// Most vCPUs that can be plugged in; 0: none beyond those at boot.
    pub max_vcpus: u32,
    /// Most memory that can be plugged in; 0: none beyond that at boot.
    pub max_memory: ByteSize,
    /// How many pieces memory can be plugged in.
    pub memory_slots: u32,
    /// How many devices can be plugged in while the VM runs.
    pub hotplug_slots: u32,
    /// Guest memory in the host's huge pages.
    pub hugepages: bool,
    /// Allocate all guest memory at start.
    pub prealloc: bool,
    /// Folder for files that back guest memory, instead of memory without a name.
    pub memory_path: Option<PathBuf>,
    /// Firmware instead of QEMU's own.
    pub firmware: Option<PathBuf>,
    /// Root file system image, the first disk of the guest.
    pub image: Option<PathBuf>,
    /// Where the guest's entropy comes from.
    pub entropy_source: PathBuf,
    /// Serve disks on a thread of their own.
    pub iothread: bool,
    /// Lock guest memory, so that the host does not swap it.
    pub lock_memory: bool,
    /// QEMU's own system call filter.
    pub seccomp: bool,
}

impl Default for Qemu {
    fn default() -> Self {
        let config = QemuConfig::default();
        Self {
            path: config.path,
            machine: MachineType::Q35,
            machine_options: config.machine_options,
            accel: Accel::Auto,
            cpu: config.cpu,
            cpu_features: config.cpu_features,
            max_vcpus: config.max_vcpus,
            max_memory: ByteSize::b(config.max_memory_bytes),
            memory_slots: config.memory_slots,
            hotplug_slots: config.hotplug_slots,
            hugepages: config.hugepages,
            prealloc: config.prealloc,
            memory_path: config.memory_path,
            firmware: config.firmware,
            image: config.image,
            entropy_source: config.entropy_source,
            iothread: config.iothread,
            lock_memory: config.lock_memory,
            seccomp: config.seccomp,
        }
    }
}

/// `[hypervisor.cloud-hypervisor]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CloudHypervisor {
    /// The program.
    pub path: PathBuf,
    /// Most vCPUs that the VM can get; 0: those at boot.
    pub max_vcpus: u32,
    /// Most memory that the VM can get; 0: that at boot.
    pub max_memory: ByteSize,
    /// Guest memory in the host's huge pages.
    pub hugepages: bool,
    /// Allocate all guest memory at start.
    pub prealloc: bool,
    /// Root file system image, persistent memory of the guest.
    pub image: Option<PathBuf>,
    /// Where the guest's entropy comes from.
    pub entropy_source: PathBuf,
    /// The VMM logs more, to the supervisor's stderr.
    pub verbose: bool,
    /// The VMM's own system call filter.
    pub seccomp: bool,
}

impl Default for CloudHypervisor {
    fn default() -> Self {
        let config = ChConfig::default();
        Self {
            path: config.path,
            max_vcpus: config.max_vcpus,
            max_memory: ByteSize::b(config.max_memory_bytes),
            hugepages: config.hugepages,
            prealloc: config.prealloc,
            image: config.image,
            entropy_source: config.entropy_source,
            verbose: config.verbose,
            seccomp: config.seccomp,
        }
    }
}

impl CloudHypervisor {
    /// As the adapter takes it.
    #[must_use]
    pub fn adapter(&self) -> ChConfig {
        ChConfig {
            path: self.path.clone(),
            path_key: "hypervisor.cloud-hypervisor.path".to_owned(),
            max_vcpus: self.max_vcpus,
            max_memory_bytes: self.max_memory.as_u64(),
            hugepages: self.hugepages,
            prealloc: self.prealloc,
            image: self.image.clone(),
            entropy_source: self.entropy_source.clone(),
            verbose: self.verbose,
            seccomp: self.seccomp,
        }
    }
}

/// A board of QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineType {
    /// A PC with PCI Express.
    #[default]
    Q35,
    /// A PC with PCI.
    Pc,
    /// A PC without PCI.
    Microvm,
    /// The board of arm64.
    Virt,
}

/// What runs a guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM if it runs guest kernels on the CPU, else QEMU's translator.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// Overrides `hypervisor.qemu.accel`.
pub(crate) const ACCEL_VAR: &str = "KUASAR_QEMU_ACCEL";

/// Most root ports that fit QEMU's first bus.
const MAX_HOTPLUG_SLOTS: u32 = 16;

impl Hypervisor {
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |key, value: String, fix| {
            Err(ConfigError::Value {
                path: path.to_owned(),
                key,
                value,
                fix,
            })
        };
        if self.api_timeout.is_zero() {
            return wrong(
                "hypervisor.api_timeout",
                "0s".to_owned(),
                "must be longer than nothing, for instance \"10s\"",
            );
        }
        if self.qemu.hotplug_slots > MAX_HOTPLUG_SLOTS {
            let value = self.qemu.hotplug_slots.to_string();
            return wrong("hypervisor.qemu.hotplug_slots", value, "must be at most 16");
        }
        if !(1..=256).contains(&self.qemu.memory_slots) {
            let value = self.qemu.memory_slots.to_string();
            return wrong("hypervisor.qemu.memory_slots", value, "must be 1 to 256");
        }
        Ok(())
    }
}

impl Qemu {
    /// As the adapter takes it.
    #[must_use]
    pub fn adapter(&self) -> QemuConfig {
        let accel = std::env::var(ACCEL_VAR).ok();
        let accel = accel.and_then(|text| clap::ValueEnum::from_str(&text, false).ok());
        QemuConfig {
            path: self.path.clone(),
            path_key: "hypervisor.qemu.path".to_owned(),
            machine: match self.machine {
                MachineType::Q35 => qemu::MachineType::Q35,
                MachineType::Pc => qemu::MachineType::Pc,
                MachineType::Microvm => qemu::MachineType::Microvm,
                MachineType::Virt => qemu::MachineType::Virt,
            },
            machine_options: self.machine_options.clone(),
            accel: match accel.unwrap_or(self.accel) {
                Accel::Auto => qemu::Accel::Auto,
                Accel::Kvm => qemu::Accel::Kvm,
                Accel::Tcg => qemu::Accel::Tcg,
            },
            cpu: self.cpu.clone(),
            cpu_features: self.cpu_features.clone(),
            max_vcpus: self.max_vcpus,
            max_memory_bytes: self.max_memory.as_u64(),
            memory_slots: self.memory_slots,
            hotplug_slots: self.hotplug_slots,
            hugepages: self.hugepages,
            prealloc: self.prealloc,
            memory_path: self.memory_path.clone(),
            firmware: self.firmware.clone(),
            image: self.image.clone(),
            entropy_source: self.entropy_source.clone(),
            iothread: self.iothread,
            lock_memory: self.lock_memory,
            seccomp: self.seccomp,
        }
    }
}
