//! What each backend can do, for users and for the tests that hold it to it.

use std::fmt::Write as _;

/// Something that a VM may be able to do besides running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// Stand still and go on.
    Pause,
    /// Be written to disk, and go on from there.
    Snapshot,
    /// Start as a copy of a VM that has booted.
    Template,
    /// Get network cards before the guest runs.
    Network,
    /// Get and lose network cards while the guest runs.
    NetworkHotplug,
    /// Get and lose disks while the guest runs.
    DiskHotplug,
    /// Get vCPUs while the guest runs.
    VcpuHotplug,
    /// Get memory while the guest runs.
    MemoryHotplug,
    /// Run where there is no KVM.
    WithoutKvm,
    /// Go on when the daemon ends, and be taken over by the next.
    OutliveDaemon,
}

impl Capability {
    /// All, in the order of the table.
    pub const ALL: [Self; 10] = [
        Self::Pause,
        Self::Snapshot,
        Self::Template,
        Self::Network,
        Self::NetworkHotplug,
        Self::DiskHotplug,
        Self::VcpuHotplug,
        Self::MemoryHotplug,
        Self::WithoutKvm,
        Self::OutliveDaemon,
    ];

    fn describe(self) -> &'static str {
        match self {
            Self::Pause => "pause and resume",
            Self::Snapshot => "snapshot to disk and restore",
            Self::Template => "start as a clone of a template",
            Self::Network => "network cards",
            Self::NetworkHotplug => "network cards plugged in later",
            Self::DiskHotplug => "disks plugged in later",
            Self::VcpuHotplug => "vCPUs plugged in later",
            Self::MemoryHotplug => "memory plugged in later",
            Self::WithoutKvm => "runs without KVM",
            Self::OutliveDaemon => "pods outlive the daemon",
        }
    }
}

/// A way to run VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Threads of the daemon.
    InProcess,
    /// QEMU with a board that has PCI.
    Qemu,
    /// QEMU's microvm board.
    QemuMicrovm,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// StratoVirt with a board that has PCI.
    StratoVirt,
    /// StratoVirt's microvm board.
    StratoVirtMicrovm,
}

impl Backend {
    /// All, in the order of the table.
    pub const ALL: [Self; 6] = [
        Self::InProcess,
        Self::Qemu,
        Self::QemuMicrovm,
        Self::CloudHypervisor,
        Self::StratoVirt,
        Self::StratoVirtMicrovm,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in-process",
            Self::Qemu => "QEMU (q35, pc, virt)",
            Self::QemuMicrovm => "QEMU (microvm)",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::StratoVirt => "StratoVirt (q35)",
            Self::StratoVirtMicrovm => "StratoVirt (microvm)",
        }
    }

    /// Whether it can; what it cannot is `VmError::Unsupported`.
    #[must_use]
    pub fn can(self, what: Capability) -> bool {
        use Capability as C;
        match self {
            Self::InProcess => !matches!(what, C::WithoutKvm | C::OutliveDaemon),
            // The share's state is in another process and cannot be written to disk.
            Self::Qemu => !matches!(what, C::Snapshot | C::Template),
            Self::QemuMicrovm => {
                matches!(
                    what,
                    C::Pause | C::Network | C::WithoutKvm | C::OutliveDaemon
                )
            }
            Self::CloudHypervisor => !matches!(what, C::Snapshot | C::Template | C::WithoutKvm),
            // It locks itself up over a vCPU, and does not tell when memory was taken.
            Self::StratoVirt => matches!(
                what,
                C::Pause | C::Network | C::NetworkHotplug | C::DiskHotplug | C::OutliveDaemon
            ),
            Self::StratoVirtMicrovm => matches!(what, C::Pause | C::Network | C::OutliveDaemon),
        }
    }
}

/// The table of `docs/backends.md`.
#[must_use]
pub fn table() -> String {
    let mut table = String::from("| |");
    for backend in Backend::ALL {
        let _ = write!(table, " {} |", backend.name());
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(Backend::ALL.len()));
    for what in Capability::ALL {
        let _ = write!(table, "\n| {} |", what.describe());
        for backend in Backend::ALL {
            let can = if backend.can(what) { "yes" } else { "no" };
            let _ = write!(table, " {can} |");
        }
    }
    table.push('\n');
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_this_table() {
        let page = include_str!("../../docs/backends.md");
        assert!(
            page.contains(&table()),
            "docs/backends.md needs:\n{}",
            table()
        );
    }
}
