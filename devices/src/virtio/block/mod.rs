//! Block device (virtio 1.2, 5.2) on raw files and block devices.
//!
//! A device is a slot: it can be built without a backing, with capacity zero, and get one
//! later through [`BlockHandle::attach`]; the driver learns of it by a configuration
//! change. Data moves between the file and guest memory without a copy in between.
//!
//! | file | idea |
//! |---|---|
//! | `config` | [`BlockConfig`], the configuration space (5.2.4) |
//! | `backing` | a raw file or block device |
//! | `slot` | what is attached now, who uses it; [`BlockHandle`] |
//! | `request` | a descriptor chain as a checked request (5.2.6) |
//! | `job` | a request in progress: its next operation, its status |
//! | `engine` | running operations: io_uring, or system calls on a thread per queue |
//! | `queue` | one virtqueue: taking requests, giving back chains |
//! | `handler` | io_uring queues on the event loop |
//! | `worker` | synchronous queues on threads |
//! | `device` | [`Block`]: activation, reset |
//! | `state` | what a snapshot keeps |

mod backing;
mod config;
mod device;
mod engine;
mod handler;
mod job;
mod queue;
mod request;
mod slot;
mod state;
mod worker;

#[cfg(test)]
mod tests;

pub use backing::{Backing, BackingError, BackingOptions};
pub use config::{BlockConfig, ConfigError};
pub use device::Block;
pub use engine::{Engine, EngineChoice};
pub use slot::{AttachError, BlockHandle, BlockStats, DetachError};

/// The unit of capacities and offsets, whatever the block size (5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// Most queues of a device: one per vCPU is enough.
pub const MAX_QUEUES: u16 = 32;
/// Entries of each queue, and so most requests in flight per queue.
pub const QUEUE_SIZE: u16 = 128;
/// Most data segments of a request (`seg_max`). More than a queue has entries: drivers use
/// indirect descriptors.
pub const MAX_SEGMENTS: u32 = 254;
/// Largest segment in bytes (`size_max`).
pub const MAX_SEGMENT_BYTES: u32 = 128 << 10;
/// Most data of a request: what the two limits above allow.
pub const MAX_REQUEST_BYTES: usize = MAX_SEGMENTS as usize * MAX_SEGMENT_BYTES as usize;
/// Most ranges of a discard or write-zeroes request.
pub const MAX_EXTENTS: usize = 32;
/// Most sectors of one range to discard (2 GiB): deallocating is cheap.
pub const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// Most sectors of one range to zero (32 MiB): files that cannot do it at once are written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 64 << 10;
/// Length of the device id (5.2.6, `VIRTIO_BLK_T_GET_ID`).
pub const ID_BYTES: usize = 20;

/// Requests taken per turn of the event loop.
const MAX_REQUESTS_PER_EVENT: usize = 64;
