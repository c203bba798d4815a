use std::io;
use std::path::PathBuf;

use devices::legacy::SerialPortError;
use devices::virtio::StateError;

use crate::arch::BootError;
use crate::config::ConfigError;

/// Why a machine could not be built. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A field of the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Kernel or initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM refused a step.
    #[error("KVM cannot {what}")]
    Kvm {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error("cannot get {bytes} bytes of guest memory")]
    Memory {
        /// As configured.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The console's log file.
    #[error("console.path = {}: cannot create the log file; check its folder", path.display())]
    Console {
        /// As configured.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device.
    #[error("cannot attach the device {name}")]
    Device {
        /// As configured.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk.
    #[error("cannot plug in the disk of slot {slot}")]
    Disk {
        /// From 0.
        slot: usize,
        /// Why.
        #[source]
        source: super::DiskError,
    },
    /// The disks' saved states.
    #[error(transparent)]
    Disks(#[from] super::DiskError),
    /// A device's saved state.
    #[error("cannot restore the device {name}")]
    Restore {
        /// As configured.
        name: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The serial port's saved state.
    #[error("cannot restore the serial port")]
    Serial(#[source] SerialPortError),
    /// Not the parts of the machine that was saved.
    #[error("the snapshot has {saved} {what}, this machine has {found}")]
    Mismatch {
        /// Which parts.
        what: &'static str,
        /// Given.
        found: usize,
        /// In the snapshot.
        saved: usize,
    },
    /// Another size of the memory to be plugged in.
    #[error("the snapshot has {saved} bytes of memory to be plugged in, this machine has {found}")]
    HotplugMemory {
        /// Given.
        found: u64,
        /// In the snapshot.
        saved: u64,
    },
    /// A thread or an fd of the machine's own.
    #[error("cannot start the machine's {what}")]
    Thread {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BuildError {
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |err| Self::Kvm {
            what,
            source: err.into(),
        }
    }

    pub(super) fn thread(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Thread { what, source }
    }
}
