//! Network device (virtio 1.2, 5.1) on tap interfaces.
//!
//! A device is a slot: it can be built without a tap, with its link down, and get one later
//! through [`NetHandle::attach`]. Frames move between the tap and guest memory without a
//! copy in between; checksums and segmentation are left to whoever is able to do them.
//!
//! | file | idea |
//! |---|---|
//! | `config` | [`NetConfig`], features, the configuration space (5.1.3, 5.1.4) |
//! | `tap` | [`TapDevice`]: a tap interface and its queues |
//! | `link` | what the device is connected to, what the driver has set; [`NetHandle`] |
//! | `limiter` | token buckets |
//! | `rx` | from the tap to the guest (5.1.6.3, 5.1.6.4) |
//! | `tx` | from the guest to the tap (5.1.6.2) |
//! | `control` | the control queue (5.1.6.5) |
//! | `handler` | queues, taps and the timer on the event loop |
//! | `device` | [`Net`]: activation, reset |
//! | `state` | what a snapshot keeps |

mod config;
mod control;
mod device;
mod handler;
mod limiter;
mod link;
mod rx;
mod state;
mod tap;
mod tx;

#[cfg(test)]
mod tests;

pub use config::{ConfigError, NetConfig};
pub use device::Net;
pub use limiter::{Rate, RateLimit};
pub use link::{AttachError, DetachError, NetHandle, NetStats};
pub use tap::{TapDevice, TapError};

/// Most pairs of receive and transmit queues.
pub const MAX_QUEUE_PAIRS: u16 = 32;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// `struct virtio_net_hdr` with `num_buffers`, in front of every frame (5.1.6).
pub const HEADER_BYTES: usize = 12;
/// Longest frame with its header: 64 KiB of IP in Ethernet with a VLAN tag.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + 18 + 65535;
/// Smallest MTU an Ethernet interface may have (RFC 791).
pub const MIN_MTU: u16 = 68;

/// Frames moved per queue and turn of the event loop.
const MAX_FRAMES_PER_EVENT: usize = 64;
/// Descriptors of one chain: Linux uses a header and 17 fragments.
const MAX_DESCRIPTORS: usize = 64;
