//! The contract between device models and transports.

pub mod balloon;
pub mod block;
mod chain;
mod config;
pub mod console;
pub mod fs;
pub mod mem;
pub mod net;
mod notify;
pub mod release;
pub mod rng;
mod serve;
mod shared_memory;
mod state;
mod vectors;
pub mod vsock;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use self::shared_memory::SharedMemory;
pub use self::state::StateError;
#[cfg(feature = "fuzzing")]
pub use self::state::seal as seal_state;
#[cfg(test)]
pub(crate) use self::state::tests as state_tests;

/// Guest memory as every device sees it: shared, cheap to clone.
///
/// All uses of `vm-memory` types go through these names, so that moving to another
/// release touches one file.
pub type GuestMemory = Arc<GuestMemoryMmap<()>>;

/// Device types of virtio 1.2, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeviceType {
    /// Network card, 5.1.
    Net = 1,
    /// Block device, 5.2.
    Block = 2,
    /// Console, 5.3.
    Console = 3,
    /// Entropy source, 5.4.
    Rng = 4,
    /// Traditional memory balloon, 5.5.
    Balloon = 5,
    /// Socket device, 5.10.
    Vsock = 19,
    /// Memory device, 5.15.
    Mem = 24,
    /// File system device, 5.11.
    Fs = 26,
}

impl DeviceType {
    /// For logs and errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "mem",
            Self::Fs => "fs",
        }
    }
}

/// How a device tells its driver something (virtio 1.2, 2.3).
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Buffers were used in `queue`; the caller has already honoured the driver's
    /// notification suppression.
    ///
    /// # Errors
    /// When the interrupt cannot be raised; the VM is then unusable.
    fn used_queue(&self, queue: u16) -> std::io::Result<()>;

    /// The configuration space changed.
    ///
    /// # Errors
    /// As [`Interrupt::used_queue`].
    fn config_changed(&self) -> std::io::Result<()>;

    /// The device met an error it cannot recover from: set DEVICE_NEEDS_RESET
    /// (virtio 1.2, 2.1.2). Never fails: there is nobody left to tell.
    fn needs_reset(&self, reason: &str);
}

/// One queue handed to an activated device.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Position in the device's queue list.
    pub index: u16,
    /// Configured and validated against guest memory by the transport.
    pub queue: Queue,
    /// Written by the driver's notification (an ioeventfd in-process).
    pub notify: EventFd,
}

/// Everything a device gets when its driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory, valid for the life of the activation.
    pub memory: GuestMemory,
    /// The queues the driver enabled, in index order.
    pub queues: Vec<ActiveQueue>,
    /// Towards the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Feature bits both sides agreed on.
    pub features: u64,
    /// Where the device registers its fds or spawns its workers.
    pub runner: Arc<dyn Runner>,
}

/// Where device work happens. The VM supplies it, so that every thread is born in the
/// VM's one helper (name, unwind guard, exit notice) and ends with it.
pub trait Runner: Send + Sync + fmt::Debug {
    /// Adds `handler` to the VM's event-loop thread.
    ///
    /// # Errors
    /// When the loop has ended or an fd cannot be watched.
    fn add(&self, handler: Box<dyn EventHandler>) -> std::io::Result<HandlerId>;

    /// As [`Runner::add`], but does not wait for the handler to start, which takes the
    /// loop's thread some time. One that cannot start fails the VM.
    ///
    /// # Errors
    /// When the loop has ended.
    fn post(&self, handler: Box<dyn EventHandler>) -> std::io::Result<HandlerId> {
        self.add(handler)
    }

    /// Takes a handler off the loop and drops it; returns after it no longer runs.
    /// Unknown ids are ignored.
    fn remove(&self, id: HandlerId);

    /// Runs `work` on a thread of its own named `name` (at most 15 bytes are visible).
    /// A panic in it fails the VM, never the process. The thread must end soon after
    /// the [`StopToken`] it is given is signalled.
    ///
    /// # Errors
    /// When the thread cannot be created.
    fn spawn(
        &self,
        name: &str,
        work: Box<dyn FnOnce(StopToken) + Send>,
    ) -> std::io::Result<WorkerId>;

    /// Signals a worker's token and joins it. Unknown ids are ignored.
    fn join(&self, id: WorkerId);
}

/// Names a handler on the event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId(pub u64);

/// Names a worker thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerId(pub u64);

/// Readable once the worker has to end; poll it beside the worker's own fds.
#[derive(Debug)]
pub struct StopToken(pub OwnedFd);

/// Readiness of a watched fd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Data can be read, or the peer closed.
    pub readable: bool,
    /// Space to write.
    pub writable: bool,
    /// Hang-up or error on the fd.
    pub hangup: bool,
}

/// Which readiness to watch; level-triggered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Watch for data.
    pub readable: bool,
    /// Watch for space.
    pub writable: bool,
}

/// The loop, as a handler sees it while it runs.
pub trait Loop {
    /// Watches `fd` and reports it as `token` to the same handler. The handler keeps the
    /// fd open until it calls [`Loop::forget`].
    ///
    /// # Errors
    /// When the kernel refuses the fd.
    fn watch(
        &mut self,
        fd: std::os::fd::RawFd,
        token: u64,
        interest: Interest,
    ) -> std::io::Result<()>;

    /// Changes what is watched.
    ///
    /// # Errors
    /// When the fd is not watched.
    fn rewatch(
        &mut self,
        fd: std::os::fd::RawFd,
        token: u64,
        interest: Interest,
    ) -> std::io::Result<()>;

    /// Stops watching. Unwatched fds are ignored.
    fn forget(&mut self, fd: std::os::fd::RawFd);
}

/// Work driven by fds on the VM's event-loop thread.
pub trait EventHandler: Send {
    /// Called once on the loop's thread, to watch the handler's fds.
    ///
    /// # Errors
    /// The handler is then dropped and the VM fails.
    fn start(&mut self, lp: &mut dyn Loop) -> std::io::Result<()>;

    /// An fd watched as `token` is ready. Must not block and must do bounded work.
    fn ready(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready);
}

/// A device model.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Which device this is.
    fn device_type(&self) -> DeviceType;

    /// Largest size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered, `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;

    /// Reads config space at `offset`; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes config space; what cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Memory besides the queues, as the device's shared memory region 0 (virtio 1.2, 2.10).
    /// The machine gives it a place in the guest.
    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        None
    }

    /// The driver set DRIVER_OK.
    ///
    /// # Errors
    /// The transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Back to the state before activation: handlers removed, workers joined, in-flight
    /// work dropped. Called on driver reset and before the VM is dropped; idempotent.
    fn reset(&mut self);

    /// Stops the device's work with nothing lost: every chain taken from a queue has been
    /// given back, handlers are off the loop and workers joined, but what the driver has
    /// set and knows stays. Afterwards the device may be saved, activated again with the
    /// same features (it then goes on where it was), or dropped. Idempotent; nothing to do
    /// for a device that is not active.
    ///
    /// Resetting does it for devices that keep nothing of their driver's.
    fn quiesce(&mut self) {
        self.reset();
    }

    /// What a snapshot keeps besides the queues: nothing that only this host or process
    /// understands. Called quiesced.
    ///
    /// # Errors
    /// [`StateError::Save`].
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    /// Takes what [`VirtioDevice::save`] returned into a fresh device of the same
    /// configuration, before it is activated. After an error the device must be dropped.
    ///
    /// # Errors
    /// When the bytes are damaged, of another version, or of a device configured otherwise.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_nothing(self.device_type(), state)
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out queues that the device needs.
    #[error("the driver enabled {got} queues, the device needs {needed}")]
    MissingQueues {
        /// Enabled.
        got: usize,
        /// Needed.
        needed: usize,
    },
    /// Registering with the runner, or another system call.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}
