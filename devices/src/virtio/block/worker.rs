//! A synchronous queue on a thread of its own.

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::MAX_REQUESTS_PER_EVENT;
use super::engine::sync;
use super::job::{Job, Step};
use super::queue::RequestQueue;
use super::request::Status;
use crate::virtio::StopToken;
use crate::virtio::notify::QueueError;

/// Serves `queue` until `stop` is signalled or the driver breaks the queue. A request in
/// progress is finished first.
pub(super) fn run(mut queue: RequestQueue, stop: &StopToken) {
    if let Err(err) = serve(&mut queue, stop) {
        queue.fail(&err);
    }
}

fn serve(queue: &mut RequestQueue, stop: &StopToken) -> Result<(), QueueError> {
    let waiter = Waiter::new(queue, stop).map_err(|source| QueueError::Io {
        what: "cannot watch the disk queue",
        source,
    })?;
    // Requests may be there already.
    queue.again()?;
    loop {
        if waiter.wait(NO_LIMIT)? == Wake::Stop {
            return Ok(());
        }
        // An empty counter is a stale event, and just as good.
        let _ = queue.active.notify.read();
        queue.quiet()?;
        let mut budget = MAX_REQUESTS_PER_EVENT;
        while let Some(job) = queue.next(&mut budget)? {
            execute(queue, &waiter, job)?;
            // Each may have taken long: the driver should not wait for the batch.
            queue.signal()?;
            if waiter.stopped()? {
                return Ok(());
            }
        }
        if budget == 0 {
            queue.again()?;
        }
        // For requests that needed no I/O.
        queue.signal()?;
    }
}

fn execute(queue: &mut RequestQueue, waiter: &Waiter<'_>, mut job: Job) -> Result<(), QueueError> {
    let status = loop {
        let (Some(operation), Some(backing)) = (job.operation(), job.backing()) else {
            break Status::IoError;
        };
        let result = sync::run(backing, &operation);
        let mut step = job.completed(result);
        if step == Step::Again && waiter.stopped()? {
            step = job.cut_short(step);
        }
        if let Step::Done(status) = step {
            break status;
        }
    };
    queue.finish(&job, status)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    Queue,
    Stop,
}

/// The queue's notification and the stop token, waited for together.
struct Waiter<'a> {
    epoll: Epoll,
    /// Watched: must stay open.
    _stop: &'a StopToken,
}

const QUEUE: u64 = 0;
const STOP: u64 = 1;
const NO_LIMIT: i32 = -1;

impl<'a> Waiter<'a> {
    fn new(queue: &RequestQueue, stop: &'a StopToken) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, data) in [
            (queue.active.notify.as_raw_fd(), QUEUE),
            (stop.0.as_raw_fd(), STOP),
        ] {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        Ok(Self { epoll, _stop: stop })
    }

    fn wait(&self, timeout_ms: i32) -> Result<Wake, QueueError> {
        let mut events = [EpollEvent::default(); 2];
        let count = loop {
            match self.epoll.wait(timeout_ms, &mut events) {
                Ok(count) => break count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(QueueError::Io {
                        what: "epoll_wait",
                        source,
                    });
                }
            }
        };
        // A hang-up is the end of whoever would signal it, and reported too.
        let stop = events.iter().take(count).any(|event| event.data() == STOP);
        Ok(if stop { Wake::Stop } else { Wake::Queue })
    }

    /// Whether to end, without waiting.
    fn stopped(&self) -> Result<bool, QueueError> {
        Ok(self.wait(0)? == Wake::Stop)
    }
}
