//! x86-64: the guest starts in 64-bit mode, as the Linux boot protocol has it, or by PVH.

mod acpi;
mod boot;
mod cpuid;
mod lapic;
pub(crate) mod layout;
mod mptable;
mod pvh;
mod registers;
mod state;

pub use boot::BootError;
pub(crate) use boot::{Entry, Kernel, load};
pub(crate) use cpuid::guest_cpuid;
pub(crate) use registers::configure_vcpu;
pub(crate) use state::{ChipsState, Refused, VcpuState};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;

/// The in-kernel interrupt controllers and timer, and the pages KVM wants for itself.
pub(crate) fn configure_vm(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let tss = usize::try_from(layout::TSS).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
    vm.set_tss_address(tss)?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config {
        // Port 0x61 is the kernel's, too: the guest calibrates its clock with it.
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
}

/// How the guest finds out about processors, interrupts and devices.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    pub(crate) vcpus: u8,
    pub(crate) devices: Vec<MmioDevice>,
    /// Write ACPI tables; the MP table is always there.
    pub(crate) acpi: bool,
}

/// A virtio-mmio device's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmioDevice {
    pub(crate) address: u32,
    pub(crate) bytes: u32,
    pub(crate) irq: u32,
}
