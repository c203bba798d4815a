//! What a machine has before it has memory: the part that is dear to create, the same for
//! all machines with as many vCPUs, and free of any state of a guest.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;

use super::BuildError;
use crate::arch;
use crate::config::{ConfigError, MAX_VCPUS};
use crate::host::Host;
use crate::kvm_vm::KvmVm;

/// VM, interrupt controllers, timer and vCPUs, without memory or state.
///
/// Creating the interrupt controllers takes most of the host's time for a clone: make
/// shells ahead of it.
#[derive(Debug)]
pub struct VmShell {
    // Dropped before the VM.
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) vm: Arc<KvmVm>,
    /// Bytes of each vCPU's `kvm_run` area.
    pub(super) run_bytes: usize,
}

impl VmShell {
    /// A shell with `vcpus` vCPUs.
    ///
    /// # Errors
    /// A number of vCPUs that cannot be, or KVM refuses.
    pub fn create(host: &Host, vcpus: u32) -> Result<Self, BuildError> {
        let most = MAX_VCPUS.min(host.facts().max_vcpus);
        if vcpus == 0 || vcpus > most {
            return Err(ConfigError::Vcpus { value: vcpus, most }.into());
        }
        Self::new(host, vcpus).map_err(BuildError::kvm("create a VM"))
    }

    fn new(host: &Host, vcpus: u32) -> Result<Self, kvm_ioctls::Error> {
        let vm = KvmVm::new(host.kvm().create_vm()?);
        arch::configure_vm(vm.fd())?;
        let vcpus = (0..vcpus)
            .map(|index| vm.fd().create_vcpu(index.into()))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            vcpus,
            vm: Arc::new(vm),
            run_bytes: host.kvm().get_vcpu_mmap_size()?,
        })
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX)
    }
}
