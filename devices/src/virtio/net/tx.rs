//! From the guest to the tap (virtio 1.2, 5.1.6.2).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use virtio_queue::{QueueOwnedT, QueueT};

use super::limiter::Limiter;
use super::link::{Counters, Link};
use super::{HEADER_BYTES, MAX_DESCRIPTORS, MAX_FRAME_BYTES, MAX_FRAMES_PER_EVENT};
use crate::virtio::chain::Chain;
use crate::virtio::notify::{self, QueueError};
use crate::virtio::vectors::GuestVectors;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

/// Why a queue stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing to do until the driver or the tap has something.
    Idle,
    /// The other side takes nothing now: the tap is full, the driver has no buffers.
    Blocked,
    /// The limit holds for this long.
    Limited(Duration),
    /// Others should have their turn.
    Budget,
    /// The tap's interface is gone.
    Lost,
}

/// Where frames go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outlet<'a> {
    /// The pair's own tap queue: frames wait until it has room.
    Own(BorrowedFd<'a>),
    /// A tap queue of another pair: frames are dropped when it is full.
    Shared(BorrowedFd<'a>),
    /// There was no tap at this generation: frames are dropped, unless one has come since.
    Down {
        link: &'a Link,
        generation: Option<u64>,
    },
}

/// One transmit queue.
#[derive(Debug)]
pub(super) struct TxQueue {
    pub(super) active: ActiveQueue,
    memory: GuestMemory,
    chain: Chain,
    vectors: GuestVectors,
}

impl TxQueue {
    pub(super) fn new(memory: &GuestMemory, active: ActiveQueue) -> Self {
        Self {
            active,
            memory: memory.clone(),
            chain: Chain::default(),
            vectors: GuestVectors::new(memory),
        }
    }

    /// Sends frames to `outlet`.
    pub(super) fn pump(
        &mut self,
        outlet: Outlet<'_>,
        limiter: &mut Limiter,
        counters: &Counters,
        interrupt: &dyn Interrupt,
    ) -> Result<Stopped, QueueError> {
        let first = self.active.queue.next_used();
        self.active.queue.disable_notification(&*self.memory)?;
        let stopped = self.send(outlet, limiter, counters)?;
        notify::used_since(&self.memory, &self.active, first, interrupt)?;
        Ok(stopped)
    }

    fn send(
        &mut self,
        outlet: Outlet<'_>,
        limiter: &mut Limiter,
        counters: &Counters,
    ) -> Result<Stopped, QueueError> {
        let memory = self.memory.clone();
        for _ in 0..MAX_FRAMES_PER_EVENT {
            if let Some(wait) = limiter.wait(Instant::now) {
                counters.limited();
                return Ok(Stopped::Limited(wait));
            }
            let Some(descriptors) = self.active.queue.iter(&*memory)?.next() else {
                if self.active.queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(Stopped::Idle);
            };
            let head = descriptors.head_index();
            let loaded = self.chain.load(descriptors, MAX_DESCRIPTORS).is_ok();
            let sent = match outlet {
                // The driver may have sent this frame after a tap was attached.
                Outlet::Down { link, generation } if link.newer(generation).is_some() => {
                    self.active.queue.go_to_previous_position();
                    return Ok(Stopped::Budget);
                }
                Outlet::Own(tap) | Outlet::Shared(tap) if loaded && self.is_frame() => {
                    self.vectors.write(tap)
                }
                _ => Err(io::ErrorKind::InvalidData.into()),
            };
            match sent {
                Ok(bytes) => {
                    let frame = bytes.saturating_sub(HEADER_BYTES);
                    limiter.spend(frame);
                    counters.passed(frame);
                }
                Err(err)
                    if err.kind() == io::ErrorKind::WouldBlock
                        && matches!(outlet, Outlet::Own(_)) =>
                {
                    self.active.queue.go_to_previous_position();
                    return Ok(Stopped::Blocked);
                }
                Err(err) if err.raw_os_error() == Some(libc::EBADFD) => {
                    self.active.queue.go_to_previous_position();
                    return Ok(Stopped::Lost);
                }
                // A frame the kernel does not take (a bad header, the interface is down).
                Err(_) => counters.dropped(),
            }
            self.active.queue.add_used(&*memory, head, 0)?;
        }
        Ok(Stopped::Budget)
    }

    /// Takes the chain's memory, if the chain can be a frame.
    fn is_frame(&mut self) -> bool {
        let readable = &self.chain.readable;
        self.vectors.clear();
        self.chain.writable.len() == 0
            && (HEADER_BYTES..=MAX_FRAME_BYTES).contains(&readable.len())
            && self.vectors.append(readable).is_ok()
    }
}
