//! When a machine reached which point of its start.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use crate::vcpu::VcpuGroup;
use crate::vm::PhaseReached;

/// Points in time since the machine began to be built, in the order in which they were
/// reached, with the exits counted until then.
#[derive(Debug)]
pub(crate) struct Phases {
    begin: Mutex<Instant>,
    vcpus: OnceLock<Weak<VcpuGroup>>,
    reached: Mutex<Vec<PhaseReached>>,
}

impl Phases {
    /// Only of a restored machine: a booted one has it made later.
    pub(crate) const VM_CREATED: &'static str = "vm created";
    pub(crate) const MEMORY_MAPPED: &'static str = "memory mapped";
    pub(crate) const DEVICES_ATTACHED: &'static str = "devices attached";
    pub(crate) const STATE_RESTORED: &'static str = "state restored";
    pub(crate) const VM_BUILT: &'static str = "vm built";
    /// Only of a machine that was made before it was known whose it is.
    pub(crate) const ADOPTED: &'static str = "adopted";
    pub(crate) const KERNEL_ENTERED: &'static str = "kernel entered";

    pub(crate) fn begin() -> Self {
        Self {
            begin: Mutex::new(Instant::now()),
            vcpus: OnceLock::new(),
            reached: Mutex::new(Vec::new()),
        }
    }

    /// Whose exits are counted.
    pub(crate) fn counts(&self, vcpus: &Arc<VcpuGroup>) {
        let _ = self.vcpus.set(Arc::downgrade(vcpus));
    }

    /// Counts from now on, for another owner.
    pub(crate) fn begin_again(&self) {
        *lock(&self.begin) = Instant::now();
        lock(&self.reached).clear();
    }

    /// Now, unless it was reached before.
    pub(crate) fn mark_first(&self, name: &'static str) {
        let since = lock(&self.begin).elapsed();
        let vcpus = self.vcpus.get().and_then(Weak::upgrade);
        let exits = vcpus.map(|vcpus| vcpus.exits()).unwrap_or_default();
        let mut reached = lock(&self.reached);
        if reached.iter().all(|phase| phase.name != name) {
            reached.push(PhaseReached { name, since, exits });
        }
    }

    pub(crate) fn all(&self) -> Vec<PhaseReached> {
        lock(&self.reached).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
