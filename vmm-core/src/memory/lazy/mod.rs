//! Memory of a clone that is read from a snapshot's files when it is first touched.
//!
//! The memory is not a mapping of the files: who cuts one short would kill this process
//! (SIGBUS), and nothing would check what is read. A thread is asked for what is missing
//! (userfaultfd(2)), reads and checks the chunk, and puts it in place.
//!
//! What cannot be read ends the machine. Who touched it waits until the vCPUs have been told
//! to stop, and then goes on with zeroes, so that every thread can be joined.

mod uffd;

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::event_loop::Threads as _;
use devices::virtio::GuestMemory;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestMemory as _;

use self::uffd::Uffd;
use super::chunks::{CHUNK_BYTES, chunk_len, chunk_start};
use super::ram_regions;
use super::stored::StoredMemory;
use crate::thread::{Thread, VmThreads};

/// Whether this host lets this process have faults of its own.
pub(crate) fn is_possible() -> bool {
    Uffd::open().is_ok()
}

/// Fills one clone's memory. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Lazy {
    shared: Arc<Shared>,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Readable when the stage has changed.
    changed: EventFd,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    /// What could not be read.
    failed: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The machine is being put together, by a thread that must not be kept waiting.
    Building,
    /// The guest may run.
    InUse,
    /// The guest does not run any more.
    GivenUp,
    /// Nobody uses the memory.
    Over,
}

impl Lazy {
    /// Serves `memory`, which nobody has touched, from `stored`.
    pub(super) fn start(
        memory: &GuestMemory,
        stored: &Arc<StoredMemory>,
        threads: &VmThreads,
    ) -> io::Result<Self> {
        let uffd = Uffd::open()?;
        for region in memory.iter() {
            uffd.register(region)?;
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                stage: Stage::Building,
                failed: None,
            }),
            changed: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let starts: Vec<_> = memory.iter().map(|region| region.as_ptr().addr()).collect();
        let filler = Filler {
            uffd,
            starts,
            stored: Arc::clone(stored),
            shared: Arc::clone(&shared),
            threads: threads.clone(),
        };
        let thread = threads.start("mem", move || filler.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// See [`super::GuestRam::in_use`].
    pub(super) fn in_use(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        match &state.failed {
            Some(why) => Err(io::Error::other(why.clone())),
            None => {
                state.stage = Stage::InUse;
                Ok(())
            }
        }
    }

    /// See [`super::GuestRam::give_up`].
    pub(super) fn give_up(&self) {
        self.shared.enter(Stage::GivenUp);
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.shared.enter(Stage::Over);
        // Joined.
        self.thread.take();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, stage: Stage) {
        self.lock().stage = stage;
        // Only a counter at its limit is refused, which is readable too.
        let _ = self.changed.write(1);
    }

    fn stage(&self) -> Stage {
        self.lock().stage
    }
}

/// A part of a chunk, and where it belongs.
struct Place {
    /// In this process.
    start: usize,
    /// Offset of the chunk in memory.
    chunk: u64,
    /// Of the chunk's bytes.
    part: Range<usize>,
}

/// What the thread works with. The threads that wait are let go when it is dropped.
struct Filler {
    uffd: Uffd,
    /// Where the regions of guest memory begin in this process.
    starts: Vec<usize>,
    stored: Arc<StoredMemory>,
    shared: Arc<Shared>,
    threads: VmThreads,
}

impl Filler {
    fn run(&self) {
        let mut buffer = vec![0; CHUNK_BYTES];
        while self.shared.stage() != Stage::Over {
            let served = self
                .wait(true)
                .and_then(|()| self.uffd.next_fault())
                .and_then(|fault| match fault {
                    Some(address) => self.fill(address, &mut buffer),
                    None => Ok(()),
                });
            if let Err(err) = served {
                self.fail(&err);
                return;
            }
        }
    }

    /// Waits for a change of the stage or, with `faults`, for somebody who touches memory.
    fn wait(&self, faults: bool) -> io::Result<()> {
        let changed = PollFd::new(self.shared.changed.as_fd(), PollFlags::POLLIN);
        let fault = PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN);
        let mut both = [changed, fault];
        let watched = both.get_mut(..if faults { 2 } else { 1 });
        match poll(watched.unwrap_or_default(), PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
        // Nothing to read when it was the other.
        let _ = self.shared.changed.read();
        Ok(())
    }

    /// Puts the chunk around `address` in place.
    fn fill(&self, address: usize, buffer: &mut [u8]) -> io::Result<()> {
        let place = self
            .place(address)
            .ok_or_else(|| io::Error::other("a page outside of guest memory"))?;
        let content = match self.stored.chunk(place.chunk) {
            None => None,
            Some(chunk) => match self.stored.read(chunk, buffer) {
                Ok(content) => content.get(place.part.clone()),
                Err(err) => {
                    self.fail(&err);
                    None
                }
            },
        };
        match content {
            Some(content) => self.uffd.copy(place.start, content)?,
            None => self.uffd.zero(place.start, place.part.len())?,
        }
        // Also who waits for a page that was there already.
        self.uffd.wake(place.start, place.part.len())
    }

    /// What to fill when somebody touches `address`.
    fn place(&self, address: usize) -> Option<Place> {
        let regions = ram_regions(self.stored.size());
        self.starts.iter().zip(regions).find_map(|(start, region)| {
            let within = u64::try_from(address.checked_sub(*start)?).ok()?;
            let within = (within < region.bytes).then_some(within)?;
            let chunk = chunk_start(region.file_offset.checked_add(within)?);
            let len = u64::try_from(chunk_len(chunk, self.stored.bytes())).ok()?;
            // A chunk may begin before the region, or end behind it.
            let first = chunk.max(region.file_offset);
            let region_end = region.file_offset.checked_add(region.bytes)?;
            let last = chunk.checked_add(len)?.min(region_end);
            let part = |at: u64| usize::try_from(at.checked_sub(chunk)?).ok();
            let before = usize::try_from(first.checked_sub(region.file_offset)?).ok()?;
            Some(Place {
                start: start.checked_add(before)?,
                chunk,
                part: part(first)?..part(last)?,
            })
        })
    }

    /// Ends the machine, and waits until its vCPUs know.
    fn fail(&self, err: &io::Error) {
        let why = format!("guest memory cannot be read from its snapshot: {err}");
        let stage = {
            let mut state = self.shared.lock();
            state.failed.get_or_insert_with(|| why.clone());
            state.stage
        };
        if stage == Stage::Building {
            return;
        }
        self.threads.failed(why);
        while self.shared.stage() == Stage::InUse && self.wait(false).is_ok() {}
    }
}

#[cfg(test)]
mod tests;
