//! Plays the guest, so that device models are tested without one.
//!
//! [`TestGuest`] is guest memory with an allocator, [`VirtQueueDriver`] the driver's half
//! of one split virtqueue (well-behaved or hostile), [`TestInterrupt`] records what the
//! device signalled, [`TestRunner`] is a real event loop with real worker threads, and
//! [`DeviceDriver`] puts them together around one device. Fuzz targets use the same types.
//!
//! A wrong call panics: these are tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "test helpers fail by panicking"
)]

mod device;
mod guest;
mod interrupt;
#[cfg(test)]
pub(crate) mod process;
mod queue;
mod registers;
mod runner;

pub use device::DeviceDriver;
pub use guest::TestGuest;
pub use interrupt::TestInterrupt;
pub use queue::{Buffer, RawDescriptor, Used, VirtQueueDriver};
pub use registers::drive_registers;
pub use runner::TestRunner;

/// How long a test waits for a device before it fails: generous, machines may be busy.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);
