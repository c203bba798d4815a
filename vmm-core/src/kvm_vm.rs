//! A KVM virtual machine that keeps the memory mapped into it alive.

use std::sync::OnceLock;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use crate::memory::GuestRam;

/// The VM's fd and its memory. Every vCPU holds one, so that the memory is unmapped only
/// after the last fd through which the guest could reach it is closed.
#[derive(Debug)]
pub(crate) struct KvmVm {
    // Dropped first.
    fd: VmFd,
    ram: OnceLock<GuestRam>,
}

impl KvmVm {
    pub(crate) fn new(fd: VmFd) -> Self {
        Self {
            fd,
            ram: OnceLock::new(),
        }
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn ram(&self) -> Option<&GuestRam> {
        self.ram.get()
    }

    /// Gives the guest its memory, one slot for each region; at most once.
    pub(crate) fn map_memory(&self, ram: GuestRam) -> Result<(), kvm_ioctls::Error> {
        if self.ram.set(ram).is_err() {
            return Err(kvm_ioctls::Error::new(libc::EEXIST));
        }
        let Some(ram) = self.ram.get() else {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        };
        for (slot, region) in (0_u32..).zip(ram.guest_memory().iter()) {
            let mapping = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the address range is a mapping owned by `self.ram`, which cannot be
            // replaced and is dropped after the VM's fd; vCPUs keep `self` alive through
            // their `Arc`. The regions of one `GuestMemoryMmap` do not overlap.
            unsafe { self.fd.set_user_memory_region(mapping)? };
        }
        Ok(())
    }
}
