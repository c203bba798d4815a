//! The three virtqueues: receive, transmit, event (virtio 1.2, 5.10.2).

use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::Bytes;

use super::buffers::{Buffers, Direction};
use super::muxer::Muxer;
use super::packet::{HEADER_LEN, MAX_PAYLOAD};
use crate::virtio::notify::{self, QueueError};
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt, Loop};

/// Packets moved per queue before others on the loop get their turn.
const BUDGET: usize = 128;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_TRANSPORT_RESET: u32 = 0;
/// `struct virtio_vsock_event`.
const EVENT_LEN: u32 = 4;

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
    /// Buffers for events, unless a VMM keeps that queue to itself.
    pub event: Option<ActiveQueue>,
}

impl Queues {
    /// Takes packets of the guest.
    pub fn pump_tx(
        &mut self,
        lp: &mut dyn Loop,
        muxer: &mut Muxer,
    ) -> Result<Progress, QueueError> {
        let memory = &*self.memory;
        let queue = &mut self.tx.queue;
        let mut buffers = Buffers::default();
        let mut progress = Progress::More;
        let mut used = false;
        for _ in 0..BUDGET {
            if muxer.is_congested() {
                progress = Progress::Blocked;
                break;
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
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
            queue.add_used(memory, head, 0)?;
            used = true;
        }
        if used {
            notify::used(memory, &mut self.tx, &*self.interrupt)?;
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
        let queue = &mut self.rx.queue;
        let mut buffers = Buffers::default();
        let mut progress = Progress::More;
        let mut used = false;
        for _ in 0..BUDGET {
            if !muxer.has_output() {
                progress = Progress::Idle;
                break;
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                // Only a starved device wants to hear of new buffers.
                if queue.enable_notification(memory)? {
                    continue;
                }
                progress = Progress::Idle;
                break;
            };
            let head = chain.head_index();
            let usable = buffers.load(memory, chain, Direction::ToGuest).is_ok()
                && buffers.payload_len() > 0;
            if !usable {
                queue.add_used(memory, head, 0)?;
                used = true;
                continue;
            }
            let Some(header) = muxer.fill(lp, &buffers) else {
                // Nothing after all: the buffer waits for the next packet.
                queue.go_to_previous_position();
                continue;
            };
            buffers.set_header(&header.to_bytes());
            queue.add_used(memory, head, packet_len(header.len))?;
            used = true;
        }
        if used {
            notify::used(memory, &mut self.rx, &*self.interrupt)?;
        }
        Ok(progress)
    }

    /// Delivers the transport reset event, if one is due and the driver has a buffer.
    pub fn pump_event(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        let memory = &*self.memory;
        let Some(event) = &mut self.event else {
            return Ok(());
        };
        let queue = &mut event.queue;
        let mut used = false;
        // One try per buffer that a ring can hold.
        for _ in 0..queue.size() {
            if !muxer.wants_reset_event() {
                break;
            }
            let Some(mut chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
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
            queue.add_used(memory, head, len)?;
            used = true;
        }
        if used {
            notify::used(memory, event, &*self.interrupt)?;
        }
        Ok(())
    }
}

/// Bytes written for a packet with `payload` bytes.
fn packet_len(payload: u32) -> u32 {
    const { assert!(HEADER_LEN + MAX_PAYLOAD <= u32::MAX as usize) };
    payload.saturating_add(44)
}
