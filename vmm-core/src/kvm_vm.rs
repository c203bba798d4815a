//! A KVM virtual machine that keeps the memory mapped into it alive.

use std::io;
use std::sync::{Arc, OnceLock};

use devices::virtio::SharedMemory;
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
    shared: OnceLock<Arc<SharedMemory>>,
}

/// RAM has the slots below: it consists of up to three regions.
const SHARED_SLOT: u32 = 3;

impl KvmVm {
    pub(crate) fn new(fd: VmFd) -> Self {
        Self {
            fd,
            ram: OnceLock::new(),
            shared: OnceLock::new(),
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

    /// Whether a device shows memory of its own.
    pub(crate) fn has_shared(&self) -> bool {
        self.shared.get().is_some()
    }

    /// Shows the guest the memory of a device at `start`; at most one.
    pub(crate) fn map_shared(&self, shared: Arc<SharedMemory>, start: u64) -> io::Result<()> {
        let mut fresh = false;
        let shared = self.shared.get_or_init(|| {
            fresh = true;
            shared
        });
        if !fresh {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mapping = kvm_userspace_memory_region {
            slot: SHARED_SLOT,
            flags: 0,
            guest_phys_addr: start,
            memory_size: shared.bytes(),
            userspace_addr: shared.host_address(),
        };
        // SAFETY: the address range is reserved by `self.shared`, with nothing in it but what
        // the device puts there for the guest. It cannot be replaced and is dropped after the
        // VM's fd; vCPUs keep `self` alive through their `Arc`.
        unsafe { self.fd.set_user_memory_region(mapping)? };
        shared.place(start)
    }
}
