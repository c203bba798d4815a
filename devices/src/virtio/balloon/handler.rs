//! The queues on the VM's event loop (virtio 1.2, 5.5.6).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::handle::Shared;
use super::{pages, stats};
use crate::virtio::release::{PageRange, PageReleaser};
use crate::virtio::serve::{Answer, ServeError, serve};
use crate::virtio::{
    ActiveQueue, EventHandler, GuestMemory, Interest, Interrupt, Loop, Ready, notify,
};

/// Chains answered before other handlers get their turn.
const BUDGET: usize = 8;

const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
const STATS: u64 = 2;
const REPORTING: u64 = 3;
const STATS_WANTED: u64 = 4;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// The queues of one activation.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) inflate: ActiveQueue,
    pub(super) deflate: ActiveQueue,
    pub(super) stats: Option<ActiveQueue>,
    pub(super) reporting: Option<ActiveQueue>,
}

impl Queues {
    fn all(&self) -> impl Iterator<Item = (u64, &ActiveQueue)> {
        [
            (INFLATE, Some(&self.inflate)),
            (DEFLATE, Some(&self.deflate)),
            (STATS, self.stats.as_ref()),
            (REPORTING, self.reporting.as_ref()),
        ]
        .into_iter()
        .filter_map(|(token, queue)| Some((token, queue?)))
    }
}

/// What one activation runs on the loop.
pub(super) struct Handler {
    pub(super) shared: Arc<Shared>,
    pub(super) releaser: Arc<dyn PageReleaser>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) queues: Queues,
    pub(super) stats_wanted: EventFd,
    /// The buffer at the head of the statistics queue has been read.
    pub(super) stats_read: bool,
}

impl EventHandler for Handler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        for (token, queue) in self.queues.all() {
            lp.watch(queue.notify.as_raw_fd(), token, READ)?;
            // Buffers queued already, and notifications from before a snapshot.
            queue.notify.write(1)?;
        }
        lp.watch(self.stats_wanted.as_raw_fd(), STATS_WANTED, READ)
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, _ready: Ready) {
        let result = match token {
            INFLATE => self.inflate(),
            DEFLATE => self.deflate(),
            STATS => self.take_stats(),
            REPORTING => self.reporting(),
            STATS_WANTED => self.return_stats(),
            _ => Ok(()),
        };
        if let Err(err) = result {
            for (_, queue) in self.queues.all() {
                lp.forget(queue.notify.as_raw_fd());
            }
            lp.forget(self.stats_wanted.as_raw_fd());
            self.interrupt.needs_reset(&format!("balloon: {err}"));
        }
    }
}

impl Handler {
    fn inflate(&mut self) -> Result<(), ServeError> {
        let _ = self.queues.inflate.notify.read();
        serve(
            &self.memory,
            &mut self.queues.inflate,
            &*self.interrupt,
            BUDGET,
            |_, chain| {
                let ranges = pages::numbered(&self.memory, chain)?;
                release(&*self.releaser, &self.shared, &ranges)
            },
        )
    }

    /// Pages that the guest takes back come from the host when they are touched: there is
    /// nothing to do but to answer.
    fn deflate(&mut self) -> Result<(), ServeError> {
        let _ = self.queues.deflate.notify.read();
        serve(
            &self.memory,
            &mut self.queues.deflate,
            &*self.interrupt,
            BUDGET,
            |_, _| Ok(Answer::Used(0)),
        )
    }

    fn reporting(&mut self) -> Result<(), ServeError> {
        let Some(queue) = &mut self.queues.reporting else {
            return Ok(());
        };
        let _ = queue.notify.read();
        serve(&self.memory, queue, &*self.interrupt, BUDGET, |_, chain| {
            let ranges = pages::reported(&self.memory, chain)?;
            release(&*self.releaser, &self.shared, &ranges)
        })
    }

    /// Reads the statistics but leaves their buffer in the queue: giving it back is how the
    /// driver is asked for the next.
    fn take_stats(&mut self) -> Result<(), ServeError> {
        let Some(active) = &mut self.queues.stats else {
            return Ok(());
        };
        let _ = active.notify.read();
        if self.stats_read {
            return Ok(());
        }
        let memory = &*self.memory;
        let Some(chain) = active.queue.iter(memory)?.next() else {
            return Ok(());
        };
        active.queue.go_to_previous_position();
        self.shared.set_stats(stats::read(memory, chain)?);
        self.stats_read = true;
        Ok(())
    }

    fn return_stats(&mut self) -> Result<(), ServeError> {
        let _ = self.stats_wanted.read();
        let Some(active) = &mut self.queues.stats else {
            return Ok(());
        };
        let memory = &*self.memory;
        // None: the driver is at it, and the next statistics are new ones.
        let Some(chain) = active.queue.iter(memory)?.next() else {
            return Ok(());
        };
        self.stats_read = false;
        active.queue.add_used(memory, chain.head_index(), 0)?;
        notify::used(memory, active, &*self.interrupt)?;
        Ok(())
    }
}

/// Releases the pages. A host that refuses keeps them, which harms nobody but itself: the
/// guest is answered all the same.
fn release(
    releaser: &dyn PageReleaser,
    shared: &Shared,
    ranges: &[PageRange],
) -> Result<Answer, ServeError> {
    match releaser.release(ranges) {
        Ok(()) => shared.add_released(
            ranges
                .iter()
                .fold(0, |sum, range| range.bytes().saturating_add(sum)),
        ),
        Err(err) => tracing::debug!(%err, "the host kept pages of the balloon"),
    }
    Ok(Answer::Used(0))
}
