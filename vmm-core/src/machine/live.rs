//! The running parts of a machine, and how they end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;

use super::disks::Disks;
use super::wiring::{Attached, Legacy};
use crate::kvm_vm::KvmVm;
use crate::vcpu::{Vcpu, VcpuGroup};

/// Everything that holds threads, fds or memory.
///
/// Fields drop in order: the guest can no longer run when the devices go, and the devices
/// no longer work when the memory goes.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) vcpus: Arc<VcpuGroup>,
    /// Locked by their threads while they run.
    pub(super) members: Vec<Arc<Mutex<Vcpu>>>,
    pub(super) devices: Vec<Attached>,
    pub(super) disks: Disks,
    pub(super) legacy: Legacy,
    pub(super) event_loop: Mutex<EventLoop>,
    pub(super) vm: Arc<KvmVm>,
}

/// A vCPU that is asked to pause leaves the guest within microseconds and finishes one
/// exit; this is for hosts under heavy load.
pub(super) const PAUSE_LIMIT: Duration = Duration::from_secs(10);

impl Live {
    /// Pauses the vCPUs; false when one still runs after [`PAUSE_LIMIT`]. Blocks.
    pub(super) fn pause(&self) -> bool {
        let now = Instant::now();
        self.vcpus
            .pause(now.checked_add(PAUSE_LIMIT).unwrap_or(now))
    }

    /// Ends vCPUs, devices and threads; returns when all of them have. Idempotent.
    pub(super) fn tear_down(&self) {
        self.vcpus.request_stop();
        if let Some(ram) = self.vm.ram() {
            ram.give_up();
        }
        self.vcpus.stop();
        for device in &self.devices {
            device.transport.reset();
        }
        self.disks.reset();
        self.event_loop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .shutdown();
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.tear_down();
    }
}
