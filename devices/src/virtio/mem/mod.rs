//! Memory device (virtio 1.2, 5.15): memory that grows and shrinks while the guest runs.
//!
//! The device owns a region of guest-physical address space, made of blocks. The host
//! says how much of it the guest may use ([`MemHandle::set_requested`]); the driver plugs
//! and unplugs blocks to get there. An unplugged block has no host memory behind it.
//!
//! The region is mapped and given to KVM as a whole when the VM is built, and the host
//! provides pages when they are touched. A driver that touches unplugged blocks against
//! the rules (5.15.6.2) therefore finds memory there, up to the size of the region:
//! whoever needs a hard limit sets it on the thread or process that runs the VM.
//!
//! | file | idea |
//! |---|---|
//! | `device` | [`Mem`]: config space, activation, saved state |
//! | `handle` | [`MemHandle`]: the requested and the plugged size, from any thread |
//! | `handler` | the request queue on the event loop |
//! | `request` | requests and responses as bytes (5.15.6) |
//! | `region` | the rules: which blocks are plugged, what each request does |
//! | `blocks` | one bit per block |

mod blocks;
mod device;
mod handle;
mod handler;
mod region;
mod request;

#[cfg(test)]
mod tests;

pub use device::{Mem, MemConfig};
pub use handle::{MemError, MemHandle, MemStatus};
pub use region::MAX_BLOCKS;
