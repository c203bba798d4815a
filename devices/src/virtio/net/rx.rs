//! From the tap to the guest (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! How long the next frame is shows only when it is read. So buffers for the longest one
//! are collected first, and stay collected from frame to frame; a frame that is longer
//! than all the driver has gets its tail cut off into a buffer of ours, and is dropped.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::limiter::Limiter;
use super::link::Counters;
use super::tx::Stopped;
use super::{HEADER_BYTES, MAX_DESCRIPTORS, MAX_FRAME_BYTES, MAX_FRAMES_PER_EVENT};
use crate::virtio::chain::{Chain, Parts};
use crate::virtio::notify::{self, QueueError};
use crate::virtio::vectors::GuestVectors;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

/// `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// Most memory runs collected, safely below what the kernel takes in one call.
const MAX_RUNS: usize = 512;

/// A chain of the driver, waiting for a frame.
#[derive(Debug)]
struct Buffer {
    head: u16,
    parts: Parts,
}

/// One receive queue.
#[derive(Debug)]
pub(super) struct RxQueue {
    pub(super) active: ActiveQueue,
    memory: GuestMemory,
    mergeable: bool,
    chain: Chain,
    /// Collected buffers, in the order of the available ring; used in the same order, so
    /// that they count as available to whoever saves the queue.
    buffers: VecDeque<Buffer>,
    /// The memory of `buffers`.
    vectors: GuestVectors,
    overflow: Vec<u8>,
}

impl RxQueue {
    pub(super) fn new(memory: &GuestMemory, active: ActiveQueue, mergeable: bool) -> Self {
        Self {
            active,
            memory: memory.clone(),
            mergeable,
            chain: Chain::default(),
            buffers: VecDeque::new(),
            vectors: GuestVectors::new(memory),
            overflow: vec![0; MAX_FRAME_BYTES],
        }
    }

    /// Gives frames of `tap`, at most `longest` bytes each, to the driver.
    pub(super) fn pump(
        &mut self,
        tap: BorrowedFd<'_>,
        longest: usize,
        limiter: &mut Limiter,
        counters: &Counters,
        interrupt: &dyn Interrupt,
    ) -> Result<Stopped, QueueError> {
        let first = self.active.queue.next_used();
        let stopped = self.receive(tap, longest, limiter, counters)?;
        notify::used_since(&self.memory, &self.active, first, interrupt)?;
        Ok(stopped)
    }

    fn receive(
        &mut self,
        tap: BorrowedFd<'_>,
        longest: usize,
        limiter: &mut Limiter,
        counters: &Counters,
    ) -> Result<Stopped, QueueError> {
        for _ in 0..MAX_FRAMES_PER_EVENT {
            if let Some(wait) = limiter.wait(Instant::now) {
                counters.limited();
                return Ok(Stopped::Limited(wait));
            }
            if !self.collect(longest)? {
                return Ok(Stopped::Blocked);
            }
            let len = match self.vectors.read(tap, &mut self.overflow) {
                Ok(len) => len,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(Stopped::Idle),
                Err(_) => return Ok(Stopped::Lost),
            };
            let frame = len.saturating_sub(HEADER_BYTES);
            limiter.spend(frame);
            if len > self.vectors.len() || len < HEADER_BYTES {
                counters.dropped();
                continue;
            }
            self.give(len)?;
            counters.passed(frame);
        }
        Ok(Stopped::Budget)
    }

    /// Collects buffers for a frame of `longest` bytes: with mergeable buffers as many as
    /// it takes, else one. `false` when the driver has to provide more first.
    fn collect(&mut self, longest: usize) -> Result<bool, QueueError> {
        let memory = self.memory.clone();
        // One look at each entry of the ring at most, and one more after notifications
        // were enabled.
        for _ in 0..=u32::from(self.active.queue.size()).saturating_mul(2) {
            let enough = if self.mergeable {
                self.vectors.len() >= longest || self.vectors.runs() >= MAX_RUNS
            } else {
                !self.buffers.is_empty()
            };
            if enough || self.buffers.len() == usize::from(self.active.queue.size()) {
                return Ok(!self.buffers.is_empty());
            }
            let Some(descriptors) = self.active.queue.iter(&*memory)?.next() else {
                if self.active.queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(false);
            };
            let head = descriptors.head_index();
            let loaded = self.chain.load(descriptors, MAX_DESCRIPTORS).is_ok();
            if !loaded || !self.is_buffer() {
                self.active.queue.add_used(&*memory, head, 0)?;
                continue;
            }
            let parts = std::mem::take(&mut self.chain.writable);
            self.vectors
                .append(&parts)
                .map_err(|_| virtio_queue::Error::InvalidChain)?;
            self.buffers.push_back(Buffer { head, parts });
        }
        Ok(false)
    }

    /// 5.1.6.3.2: room for the header at least; all of it in guest memory.
    fn is_buffer(&self) -> bool {
        let writable = &self.chain.writable;
        self.chain.readable.len() == 0
            && writable.len() >= HEADER_BYTES
            && writable.is_in(&self.memory)
    }

    /// Gives the frame of `len` bytes that lies in the first buffers to the driver.
    fn give(&mut self, len: usize) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let mut lens = Vec::with_capacity(1);
        let (mut left, mut room) = (len, 0_usize);
        for buffer in &self.buffers {
            let now = left.min(buffer.parts.len());
            lens.push((buffer.head, u32::try_from(now).unwrap_or(u32::MAX)));
            room = room.saturating_add(buffer.parts.len());
            left = left.saturating_sub(now);
            if left == 0 {
                break;
            }
        }
        // 5.1.6.4.1: always set, one without mergeable buffers.
        let count = u16::try_from(lens.len()).unwrap_or(u16::MAX);
        if let Some(buffer) = self.buffers.front() {
            buffer
                .parts
                .write(&memory, NUM_BUFFERS, &count.to_le_bytes())
                .map_err(|_| virtio_queue::Error::InvalidChain)?;
        }
        self.buffers.drain(..lens.len());
        self.vectors.advance(room);
        self.vectors.compact();
        add_used_together(&mut self.active, &memory, &lens)
    }
}

/// Puts chains in the used ring so that the driver sees all of them or none: it takes the
/// buffers of a frame to be there once the first is (5.1.6.4.1).
fn add_used_together(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap<()>,
    chains: &[(u16, u32)],
) -> Result<(), QueueError> {
    let Some(((last_head, last_len), others)) = chains.split_last() else {
        return Ok(());
    };
    let queue = &mut active.queue;
    let first = Wrapping(queue.next_used());
    let mut next = first;
    for (head, len) in others {
        let slot = next.0.checked_rem(queue.size()).unwrap_or(0);
        let mut element = [0; 8];
        let (id, written) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(*head).to_le_bytes());
        written.copy_from_slice(&len.to_le_bytes());
        // 2.7.8: flags and idx, then elements of eight bytes.
        let offset = u64::from(slot).saturating_mul(8).saturating_add(4);
        let addr = GuestAddress(queue.used_ring().saturating_add(offset));
        memory
            .write_slice(&element, addr)
            .map_err(virtio_queue::Error::GuestMemory)?;
        next += 1;
    }
    // Writes the last element, then the index.
    queue.set_next_used(next.0);
    Ok(queue.add_used(memory, *last_head, *last_len)?)
}
