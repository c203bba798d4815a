//! An io_uring queue on the VM's event loop.

use std::io;
use std::os::fd::AsRawFd;

use super::MAX_REQUESTS_PER_EVENT;
use super::engine::uring::{InFlight, Ring};
use super::job::{Job, Step};
use super::queue::RequestQueue;
use super::request::Status;
use crate::virtio::notify::QueueError;
use crate::virtio::{EventHandler, Interest, Loop, Ready};

const NOTIFY: u64 = 0;
const COMPLETIONS: u64 = 1;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// See the module. Dropping it finishes what is in flight.
#[derive(Debug)]
pub(super) struct UringHandler {
    queue: RequestQueue,
    in_flight: InFlight,
    ring: Ring,
    failed: bool,
}

impl UringHandler {
    pub(super) fn new(queue: RequestQueue, ring: Ring) -> Self {
        Self {
            queue,
            in_flight: InFlight::new(ring.clone()),
            ring,
            failed: false,
        }
    }

    fn pump(&mut self) -> Result<(), QueueError> {
        self.queue.quiet()?;
        let mut budget = MAX_REQUESTS_PER_EVENT;
        let mut submitted = true;
        // The second round takes what the kernel completed at once, from its cache.
        for _ in 0..2 {
            while let Some((mut job, result)) = self.in_flight.take() {
                let step = job.completed(result);
                self.go_on(job, step)?;
            }
            while !self.in_flight.is_full() {
                let Some(job) = self.queue.next(&mut budget)? else {
                    break;
                };
                self.go_on(job, Step::Again)?;
            }
            submitted = self.submit()?;
        }
        if budget == 0 || !submitted {
            self.queue.again()?;
        }
        self.queue.signal()
    }

    fn go_on(&mut self, job: Job, step: Step) -> Result<(), QueueError> {
        match step {
            Step::Again => match self.in_flight.start(job) {
                Ok(()) => Ok(()),
                Err(job) => self.queue.finish(&job, Status::IoError),
            },
            Step::Done(status) => self.queue.finish(&job, status),
        }
    }

    fn submit(&mut self) -> Result<bool, QueueError> {
        self.in_flight.submit().map_err(|source| QueueError::Io {
            what: "io_uring_enter",
            source,
        })
    }

    /// Finishes what is in flight, so that every chain taken is given back: a snapshot
    /// then needs no state per queue.
    fn drain(&mut self) -> Result<(), QueueError> {
        while !self.in_flight.is_empty() {
            self.in_flight.wait().map_err(|source| QueueError::Io {
                what: "io_uring_enter",
                source,
            })?;
            while let Some((mut job, result)) = self.in_flight.take() {
                let step = job.completed(result);
                let step = job.cut_short(step);
                self.go_on(job, step)?;
            }
        }
        self.queue.signal()
    }
}

impl EventHandler for UringHandler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(self.queue.active.notify.as_raw_fd(), NOTIFY, READ)?;
        lp.watch(self.ring.fd(), COMPLETIONS, READ)?;
        // Requests may be there already.
        self.queue.active.notify.write(1)
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, _ready: Ready) {
        if self.failed {
            return;
        }
        if token == NOTIFY {
            // An empty counter is a stale event, and just as good.
            let _ = self.queue.active.notify.read();
        }
        if let Err(err) = self.pump() {
            self.failed = true;
            lp.forget(self.queue.active.notify.as_raw_fd());
            lp.forget(self.ring.fd());
            self.queue.fail(&err);
        }
    }
}

impl Drop for UringHandler {
    fn drop(&mut self) {
        if self.failed {
            // `InFlight` waits, but a broken queue is not touched any more.
            return;
        }
        if let Err(err) = self.drain() {
            tracing::warn!(%err, "disk requests lost at reset");
        }
    }
}
