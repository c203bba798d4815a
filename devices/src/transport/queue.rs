//! A queue as its driver sets it up, until a device gets it.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

/// One queue as the driver sets it up, not yet checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    max_size: u16,
    size: u32,
    pub(super) ready: bool,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// Where a device begins in its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    /// With the first entry, for a driver that has just set them up.
    Start,
    /// Where a quiesced device stopped: no chain is in flight, so what it has used is what
    /// it has taken, and the used ring says how much that is.
    Used,
    /// With this entry of the available ring, as somebody outside remembers.
    At(u16),
}

/// Why a queue cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("its size {0} is not a power of two up to {1}")]
    Size(u32, u16),
    #[error("its {part} at {address:#x} is misaligned")]
    Alignment { part: &'static str, address: u64 },
    #[error("its {part} at {address:#x} lies outside guest memory")]
    Outside { part: &'static str, address: u64 },
    #[error("its used ring cannot be read: {0}")]
    Used(#[source] virtio_queue::Error),
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            ready: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn set_size(&mut self, size: u32) {
        self.size = size;
    }

    /// The queue, if all of it lies in guest memory (virtio 1.2, 2.7).
    pub(super) fn build(
        &self,
        memory: &GuestMemoryMmap<()>,
        event_idx: bool,
        position: Position,
    ) -> Result<Queue, QueueError> {
        let bad_size = || QueueError::Size(self.size, self.max_size);
        let size = u16::try_from(self.size).map_err(|_| bad_size())?;
        let mut queue = Queue::new(self.max_size).map_err(|_| bad_size())?;
        queue.try_set_size(size).map_err(|_| bad_size())?;

        let entries = usize::from(size);
        let parts = [
            ("descriptor area", self.desc, entries.saturating_mul(16)),
            (
                "driver area",
                self.driver,
                entries.saturating_mul(2).saturating_add(6),
            ),
            (
                "device area",
                self.device,
                entries.saturating_mul(8).saturating_add(6),
            ),
        ];
        for (part, address, bytes) in parts {
            if !memory.check_range(GuestAddress(address), bytes) {
                return Err(QueueError::Outside { part, address });
            }
        }
        let misaligned = |part, address| move |_| QueueError::Alignment { part, address };
        queue
            .try_set_desc_table_address(GuestAddress(self.desc))
            .map_err(misaligned("descriptor area", self.desc))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .map_err(misaligned("driver area", self.driver))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .map_err(misaligned("device area", self.device))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if position != Position::Start {
            let used = queue
                .used_idx(memory, Ordering::Acquire)
                .map_err(QueueError::Used)?
                .0;
            queue.set_next_used(used);
            queue.set_next_avail(match position {
                Position::At(available) => available,
                Position::Start | Position::Used => used,
            });
        }
        Ok(queue)
    }
}

/// Replaces the low half of `value`.
pub(super) fn set_low(value: &mut u64, low: u32) {
    *value = *value & !u64::from(u32::MAX) | u64::from(low);
}

/// Replaces the high half of `value`.
pub(super) fn set_high(value: &mut u64, high: u32) {
    *value = *value & u64::from(u32::MAX) | u64::from(high) << 32;
}
