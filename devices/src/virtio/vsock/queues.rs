//! The three virtqueues: receive, transmit, event (virtio 1.2, 5.10.2).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::buffers::{Buffers, Direction};
use super::muxer::Muxer;
use super::packet::{HEADER_LEN, MAX_PAYLOAD};
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt, Loop};

/// Packets moved per queue before others on the loop get their turn.
const BUDGET: usize = 128;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_TRANSPORT_RESET: u32 = 0;
/// `struct virtio_vsock_event`.
const EVENT_LEN: u32 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, virtio 1.2, 2.7.6.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// The driver broke a queue; only a reset of the device helps.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Indices or ring addresses make no sense.
    #[error("virtqueue {queue}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What is wrong.
        #[source]
        source: virtio_queue::Error,
    },
    /// The interrupt could not be raised.
    #[error("cannot interrupt the driver")]
    Interrupt(#[source] io::Error),
}

/// Why a pump stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do until an event.
    Idle,
    /// Its budget is spent: to be called again.
    More,
    /// Too many replies wait for the receive queue.
    Blocked,
}

/// The queues of one activation.
#[derive(Debug)]
pub struct Queues {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Towards the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Buffers for packets to the guest.
    pub rx: ActiveQueue,
    /// Packets of the guest.
    pub tx: ActiveQueue,
    /// Buffers for events.
    pub event: ActiveQueue,
}

impl Queues {
    /// Takes packets of the guest.
    pub fn pump_tx(
        &mut self,
        lp: &mut dyn Loop,
        muxer: &mut Muxer,
    ) -> Result<Progress, QueueError> {
        let memory = &*self.memory;
        let index = self.tx.index;
        let ring = |source| QueueError::Ring {
            queue: index,
            source,
        };
        let queue = &mut self.tx.queue;
        let mut buffers = Buffers::default();
        let mut progress = Progress::More;
        let mut used = false;
        for _ in 0..BUDGET {
            if muxer.is_congested() {
                progress = Progress::Blocked;
                break;
            }
            let Some(chain) = queue.iter(memory).map_err(ring)?.next() else {
                if queue.enable_notification(memory).map_err(ring)? {
                    continue;
                }
                progress = Progress::Idle;
                break;
            };
            let head = chain.head_index();
            // No packet at all can only be returned: there is nobody to answer.
            if buffers.load(memory, chain, Direction::FromGuest).is_ok() {
                muxer.receive(lp, &buffers);
            }
            queue.add_used(memory, head, 0).map_err(ring)?;
            used = true;
        }
        if used {
            notify(memory, &mut self.tx, &*self.interrupt)?;
        }
        Ok(progress)
    }

    /// Sends packets to the guest.
    pub fn pump_rx(
        &mut self,
        lp: &mut dyn Loop,
        muxer: &mut Muxer,
    ) -> Result<Progress, QueueError> {
        let memory = &*self.memory;
        let index = self.rx.index;
        let ring = |source| QueueError::Ring {
            queue: index,
            source,
        };
        let queue = &mut self.rx.queue;
        let mut buffers = Buffers::default();
        let mut progress = Progress::More;
        let mut used = false;
        for _ in 0..BUDGET {
            if !muxer.has_output() {
                progress = Progress::Idle;
                break;
            }
            let Some(chain) = queue.iter(memory).map_err(ring)?.next() else {
                // Only a starved device wants to hear of new buffers.
                if queue.enable_notification(memory).map_err(ring)? {
                    continue;
                }
                progress = Progress::Idle;
                break;
            };
            let head = chain.head_index();
            let usable = buffers.load(memory, chain, Direction::ToGuest).is_ok()
                && buffers.payload_len() > 0;
            if !usable {
                queue.add_used(memory, head, 0).map_err(ring)?;
                used = true;
                continue;
            }
            let Some(header) = muxer.fill(lp, &buffers) else {
                // Nothing after all: the buffer waits for the next packet.
                queue.go_to_previous_position();
                continue;
            };
            buffers.set_header(&header.to_bytes());
            queue
                .add_used(memory, head, packet_len(header.len))
                .map_err(ring)?;
            used = true;
        }
        if used {
            notify(memory, &mut self.rx, &*self.interrupt)?;
        }
        Ok(progress)
    }

    /// Delivers the transport reset event, if one is due and the driver has a buffer.
    pub fn pump_event(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        let memory = &*self.memory;
        let index = self.event.index;
        let ring = |source| QueueError::Ring {
            queue: index,
            source,
        };
        let queue = &mut self.event.queue;
        let mut used = false;
        // One try per buffer that a ring can hold.
        for _ in 0..queue.size() {
            if !muxer.wants_reset_event() {
                break;
            }
            let Some(mut chain) = queue.iter(memory).map_err(ring)?.next() else {
                if queue.enable_notification(memory).map_err(ring)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = chain.next().is_some_and(|buffer| {
                buffer.is_write_only()
                    && buffer.len() >= EVENT_LEN
                    && memory
                        .write_slice(&EVENT_TRANSPORT_RESET.to_le_bytes(), buffer.addr())
                        .is_ok()
            });
            if written {
                muxer.reset_event_sent();
            }
            let len = if written { EVENT_LEN } else { 0 };
            queue.add_used(memory, head, len).map_err(ring)?;
            used = true;
        }
        if used {
            notify(memory, &mut self.event, &*self.interrupt)?;
        }
        Ok(())
    }
}

/// Bytes written for a packet with `payload` bytes.
fn packet_len(payload: u32) -> u32 {
    const { assert!(HEADER_LEN + MAX_PAYLOAD <= u32::MAX as usize) };
    payload.saturating_add(44)
}

/// Interrupts the driver unless it asked not to be (virtio 1.2, 2.7.7 and 2.7.10).
fn notify(
    memory: &vm_memory::GuestMemoryMmap<()>,
    active: &mut ActiveQueue,
    interrupt: &dyn Interrupt,
) -> Result<(), QueueError> {
    let ring = |source| QueueError::Ring {
        queue: active.index,
        source,
    };
    let mut wanted = active.queue.needs_notification(memory).map_err(ring)?;
    if wanted && !active.queue.event_idx_enabled() {
        let flags: u16 = memory
            .load(GuestAddress(active.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|err| ring(virtio_queue::Error::GuestMemory(err)))?;
        wanted = u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0;
    }
    if wanted {
        interrupt
            .used_queue(active.index)
            .map_err(QueueError::Interrupt)?;
    }
    Ok(())
}
