//! What a machine has before it has memory: the part that is dear to create, the same for
//! all machines with as many vCPUs, and free of any state of a guest.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;

use crate::arch;
use crate::host::Host;
use crate::kvm_vm::KvmVm;

/// VM, interrupt controllers, timer and vCPUs.
#[derive(Debug)]
pub(super) struct Shell {
    // Dropped before the VM.
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) vm: Arc<KvmVm>,
    /// Bytes of each vCPU's `kvm_run` area.
    pub(super) run_bytes: usize,
}

impl Shell {
    pub(super) fn create(host: &Host, vcpus: u8) -> Result<Self, kvm_ioctls::Error> {
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
}
