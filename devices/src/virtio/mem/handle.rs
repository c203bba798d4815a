//! The host's side of the memory device, from any thread.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::region::Region;
use super::request::{Request, Response};
use crate::virtio::config::ConfigChange;
use crate::virtio::release::PageReleaser;

/// How far the guest has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemStatus {
    /// Bytes that the guest should have plugged.
    pub requested_bytes: u64,
    /// Bytes that it has plugged.
    pub plugged_bytes: u64,
}

/// Why a size or a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The region's geometry is impossible.
    #[error("memory device region: {field} {value:#x} {rule}")]
    Geometry {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be.
        rule: &'static str,
    },
    /// More than the region has.
    #[error(
        "requested memory {requested_bytes} is more than the device's region, {region_bytes} bytes"
    )]
    TooLarge {
        /// What was asked for.
        requested_bytes: u64,
        /// What there is.
        region_bytes: u64,
    },
    /// Blocks are plugged as a whole.
    #[error("requested memory {requested_bytes} is not a multiple of {block_bytes} bytes")]
    NotWholeBlocks {
        /// What was asked for.
        requested_bytes: u64,
        /// Size of a block.
        block_bytes: u64,
    },
    /// The driver cannot be told.
    #[error("cannot notify the memory driver")]
    Notify(#[source] io::Error),
}

/// Controls one memory device; clones share it. Survives resets of the device.
#[derive(Clone, Debug)]
pub struct MemHandle {
    pub(super) shared: Arc<Shared>,
}

/// What the handle, the device (config space) and its handler (requests) share.
#[derive(Debug)]
pub(super) struct Shared {
    region: Mutex<Region>,
    status: watch::Sender<MemStatus>,
    pub(super) config_change: ConfigChange,
}

impl MemHandle {
    /// Asks the guest to have `bytes` of the region plugged, a multiple of the block size.
    /// The guest follows in its own time, and only as far as it can: watch
    /// [`MemHandle::subscribe`].
    ///
    /// # Errors
    /// [`MemError::TooLarge`], [`MemError::NotWholeBlocks`], [`MemError::Notify`].
    pub fn set_requested(&self, bytes: u64) -> Result<(), MemError> {
        if self.shared.set_requested(bytes)? {
            self.shared
                .config_change
                .notify()
                .map_err(MemError::Notify)?;
        }
        Ok(())
    }

    /// Bytes that the guest should have plugged.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.status().requested_bytes
    }

    /// Bytes that the guest has plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.status().plugged_bytes
    }

    /// Both.
    #[must_use]
    pub fn status(&self) -> MemStatus {
        *self.shared.status.borrow()
    }

    /// Follows [`MemHandle::status`].
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<MemStatus> {
        self.shared.status.subscribe()
    }
}

impl Shared {
    pub(super) fn new(region: Region) -> Self {
        let shared = Self {
            region: Mutex::new(region),
            status: watch::Sender::default(),
            config_change: ConfigChange::default(),
        };
        shared.publish(&shared.region());
        shared
    }

    /// A copy is 128 KiB at most; this is for config space and snapshots.
    pub(super) fn region(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it changed.
    pub(super) fn set_requested(&self, bytes: u64) -> Result<bool, MemError> {
        let mut region = self.region();
        if bytes > region.bytes() {
            return Err(MemError::TooLarge {
                requested_bytes: bytes,
                region_bytes: region.bytes(),
            });
        }
        if bytes.checked_rem(region.block_bytes) != Some(0) {
            return Err(MemError::NotWholeBlocks {
                requested_bytes: bytes,
                block_bytes: region.block_bytes,
            });
        }
        let changed = std::mem::replace(&mut region.requested_bytes, bytes) != bytes;
        self.publish(&region);
        Ok(changed)
    }

    pub(super) fn handle(&self, request: Request, releaser: &dyn PageReleaser) -> Response {
        let mut region = self.region();
        let response = region.handle(request, releaser);
        self.publish(&region);
        response
    }

    fn publish(&self, region: &Region) {
        let now = MemStatus {
            requested_bytes: region.requested_bytes,
            plugged_bytes: region.plugged_bytes(),
        };
        self.status
            .send_if_modified(|status| std::mem::replace(status, now) != now);
    }
}
