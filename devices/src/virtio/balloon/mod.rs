//! Traditional memory balloon (virtio 1.2, 5.5): the guest gives memory back.
//!
//! * Inflating: the host asks for bytes ([`BalloonHandle::set_target`]), the driver names
//!   the pages that it will not use, and the host frees what is behind them.
//! * Free page reporting: the driver names pages that happen to be free, unasked; it may
//!   use them again at any time. This alone keeps an idle guest small.
//!
//! Pages that come back hold anything: zeroes, or in a clone what its template held.
//! `VIRTIO_BALLOON_F_PAGE_POISON` is not offered, so a guest that relies on the content
//! of free pages (`init_on_free`) does not report them.
//!
//! | file | idea |
//! |---|---|
//! | `device` | [`Balloon`]: features, config space, activation, saved state |
//! | `handle` | [`BalloonHandle`]: target, size and statistics, from any thread |
//! | `handler` | the queues on the event loop |
//! | `pages` | the pages that a chain names (5.5.6, 5.5.6.7) |
//! | `stats` | guest memory statistics (5.5.6.3) |

mod device;
mod handle;
mod handler;
mod pages;
mod stats;

#[cfg(test)]
mod tests;

pub use device::{Balloon, BalloonConfig};
pub use handle::{BalloonError, BalloonHandle, BalloonStatus};
pub use pages::{MAX_PFNS_PER_CHAIN, MAX_RANGES_PER_CHAIN};
pub use stats::{BalloonStats, MAX_STATS_BYTES};
