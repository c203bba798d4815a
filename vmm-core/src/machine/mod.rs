//! The in-process machine.
//!
//! Made in two steps: a [`frame`](self) of VM, memory and devices, and the state it starts
//! from, which is a kernel's entry ([`Machine::build`]) or a snapshot's
//! ([`Machine::restore`]).

mod adopt;
mod boot;
mod cmdline;
mod disks;
mod elastic;
mod error;
mod frame;
mod live;
mod phases;
mod restore;
mod save;
mod shell;
mod vm;
mod wiring;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::legacy::ConsoleOutput;
use devices::virtio::fs::FsHandle;
use devices::virtio::mem::MemHandle;
use devices::virtio::net::NetHandle;
use devices::virtio::vsock::VsockHandle;
use tokio::sync::watch;

pub use self::adopt::Identity;
pub use self::disks::DiskError;
pub use self::error::BuildError;
use self::live::Live;
pub(crate) use self::phases::Phases;
pub use self::restore::CloneConfig;
pub use self::shell::VmShell;
pub(crate) use self::wiring::LegacyState;
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::thread::VmThreads;
use crate::vcpu::VcpuState;
use crate::vm::ExitCounts;

/// A virtual machine whose vCPUs and devices are threads of this process.
///
/// Dropping it ends it: when drop returns its threads are joined, its memory is freed and
/// its sockets are removed. Operations are those of [`crate::vm::Vm`].
#[derive(Debug)]
pub struct Machine {
    host: Host,
    threads: VmThreads,
    exit: ExitNotice,
    phases: Arc<Phases>,
    console: ConsoleOutput,
    cmdline: String,
    memory_bytes: u64,
    share: Option<FsHandle>,
    vsock: Option<VsockHandle>,
    nets: Vec<NetHandle>,
    mem: Option<MemHandle>,
    live: Mutex<Option<Arc<Live>>>,
    /// Exits counted by a machine that was torn down.
    final_exits: Mutex<ExitCounts>,
    torn_down: watch::Sender<bool>,
}

impl Machine {
    /// The kernel's complete command line.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }

    /// States of the vCPUs; empty once the machine was stopped.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<VcpuState> {
        self.live()
            .map_or_else(Vec::new, |live| live.vcpus.states())
    }

    /// Holds the guest's dials to `port` of the host instead of refusing them, and tells
    /// the first: [`devices::virtio::vsock::VsockHandle::hold`].
    ///
    /// # Errors
    /// As there; `Unsupported` without a socket device.
    pub fn hold(&self, port: u32) -> std::io::Result<tokio::sync::oneshot::Receiver<()>> {
        match &self.vsock {
            Some(vsock) => vsock.hold(port),
            None => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    fn live(&self) -> Option<Arc<Live>> {
        self.lock_live().clone()
    }

    fn lock_live(&self) -> MutexGuard<'_, Option<Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the running parts, keeping their figures.
    fn take_live(&self) -> Option<Arc<Live>> {
        let live = self.lock_live().take()?;
        self.console.finish();
        *self
            .final_exits
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = live.vcpus.exits();
        Some(live)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.exit.report(crate::vm::ExitReason::Stopped);
        if let Some(live) = self.take_live() {
            live.tear_down();
        }
    }
}

#[cfg(test)]
mod tests;
