//! What can be configured.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Boards that StratoVirt emulates for us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineType {
    /// A PC with PCI Express; devices are plugged into root ports.
    #[default]
    Q35,
    /// A PC without PCI and ACPI: virtio-mmio, no hotplug.
    Microvm,
}

impl MachineType {
    /// As on StratoVirt's command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }
}

/// How StratoVirt is started: `[hypervisor.stratovirt]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StratoConfig {
    /// The program.
    pub path: PathBuf,
    /// The board.
    pub machine: MachineType,
    /// Appended to `-machine`: options separated by commas.
    pub machine_options: String,
    /// Allocate all guest memory at start.
    pub prealloc: bool,
    /// Folder for a file that backs guest memory, instead of memory without a name.
    pub memory_path: Option<PathBuf>,
    /// Firmware that boots the kernel, on a board with PCI; unset: it is entered directly.
    pub firmware: Option<PathBuf>,
    /// Root file system image, as first disk.
    pub image: Option<PathBuf>,
    /// Where the guest's entropy comes from.
    pub entropy_source: PathBuf,
    /// StratoVirt's own system call filter.
    pub seccomp: bool,
}

impl Default for StratoConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/usr/bin/stratovirt"),
            machine: MachineType::Q35,
            machine_options: String::new(),
            prealloc: false,
            memory_path: None,
            firmware: None,
            image: None,
            entropy_source: PathBuf::from("/dev/urandom"),
            seccomp: true,
        }
    }
}
