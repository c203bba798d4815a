//! Telling the driver of used buffers (virtio 1.2, 2.7.7 and 2.7.10).

use std::io;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ActiveQueue, Interrupt};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// The driver broke a queue, or cannot be told: only a reset of the device helps.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// Indices or ring addresses make no sense.
    #[error("invalid queue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The interrupt could not be raised.
    #[error("cannot interrupt the driver: {0}")]
    Interrupt(#[source] io::Error),
    /// Another system call.
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Interrupts the driver for the buffers used since the last call, unless it asked not to
/// be.
pub(crate) fn used(
    memory: &GuestMemoryMmap<()>,
    active: &mut ActiveQueue,
    interrupt: &dyn Interrupt,
) -> Result<(), QueueError> {
    let mut wanted = active.queue.needs_notification(memory)?;
    if wanted && !active.queue.event_idx_enabled() {
        wanted = !is_suppressed(memory, active)?;
    }
    raise(wanted, active, interrupt)
}

/// As [`used`], for the buffers used since the used index was `before`: for devices that
/// write the used ring themselves.
pub(crate) fn used_since(
    memory: &GuestMemoryMmap<()>,
    active: &ActiveQueue,
    before: u16,
    interrupt: &dyn Interrupt,
) -> Result<(), QueueError> {
    let queue = &active.queue;
    let now = queue.next_used();
    if now == before {
        return Ok(());
    }
    // Our index must be visible before the driver's wish is read: it looks at the index
    // again after it has said what it wants.
    fence(Ordering::SeqCst);
    let wanted = if queue.event_idx_enabled() {
        // used_event, behind flags, idx and the ring itself (2.7.6).
        let offset = u64::from(queue.size()).saturating_mul(2).saturating_add(4);
        let event = load(memory, queue.avail_ring().saturating_add(offset))?;
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    } else {
        !is_suppressed(memory, active)?
    };
    raise(wanted, active, interrupt)
}

/// Whether the driver set the flag that turns interrupts off.
fn is_suppressed(memory: &GuestMemoryMmap<()>, active: &ActiveQueue) -> Result<bool, QueueError> {
    let flags = load(memory, active.queue.avail_ring())?;
    Ok(flags & NO_INTERRUPT != 0)
}

fn raise(wanted: bool, active: &ActiveQueue, interrupt: &dyn Interrupt) -> Result<(), QueueError> {
    if wanted {
        interrupt
            .used_queue(active.index)
            .map_err(QueueError::Interrupt)?;
    }
    Ok(())
}

fn load(memory: &GuestMemoryMmap<()>, addr: u64) -> Result<u16, QueueError> {
    let value: u16 = memory
        .load(GuestAddress(addr), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestGuest, TestInterrupt, VirtQueueDriver};

    /// Sends as many used buffers as the index says, with the driver wanting to hear of
    /// the one at `event`; returns whether it was interrupted.
    fn interrupted(before: u16, now: u16, event: u16, event_idx: bool) -> bool {
        let guest = TestGuest::new(1 << 20);
        let driver = VirtQueueDriver::new(&guest, 8);
        let mut active = driver.activate(0);
        active.queue.set_event_idx(event_idx);
        active.queue.set_next_used(now);
        let (_, avail, _) = driver.addresses();
        guest.write(avail + 4 + 16, &event.to_le_bytes());
        let interrupt = TestInterrupt::default();
        used_since(&guest.memory(), &active, before, &interrupt).unwrap();
        if !event_idx {
            // Asked not to: never.
            guest.write(avail, &1_u16.to_le_bytes());
            let quiet = TestInterrupt::default();
            used_since(&guest.memory(), &active, before, &quiet).unwrap();
            assert_eq!(quiet.used_count(0), 0);
        }
        interrupt.used_count(0) == 1
    }

    #[test]
    fn event_index_2_7_10() {
        assert!(!interrupted(5, 5, 5, true));
        assert!(interrupted(5, 6, 5, true));
        assert!(!interrupted(5, 6, 6, true));
        assert!(!interrupted(5, 6, 4, true));
        assert!(interrupted(5, 9, 7, true));
        assert!(interrupted(u16::MAX, 1, u16::MAX, true));
        assert!(interrupted(u16::MAX, 1, 0, true));
        assert!(!interrupted(u16::MAX, 1, 1, true));
    }

    #[test]
    fn flag_2_7_7() {
        assert!(interrupted(5, 6, 0, false));
        assert!(!interrupted(5, 5, 0, false));
    }
}
