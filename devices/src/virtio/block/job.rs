//! A request in progress. Engines run its operations one after the other; the job decides
//! what comes next: the rest after a short transfer, the next range, another way to zero.

use std::io;

use vm_memory::GuestAddress;

use super::request::{Extent, Kind, Status};
use super::slot::{Counters, Lease};
use super::{Backing, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES};
use crate::virtio::vectors::GuestVectors;

/// Zeroes for files that cannot zero ranges themselves.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// One system call's worth of work; offsets and lengths in bytes.
#[derive(Debug)]
pub(super) enum Operation<'a> {
    Read {
        into: &'a GuestVectors,
        offset: u64,
    },
    Write {
        from: &'a GuestVectors,
        offset: u64,
        /// To stable storage before it completes.
        durable: bool,
    },
    Flush,
    /// fallocate(2).
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// Deallocate without a promise about what is read afterwards.
    Discard {
        offset: u64,
        len: u64,
    },
    /// Write `data` at `offset`.
    Fill {
        data: &'static [u8],
        offset: u64,
        durable: bool,
    },
}

/// After an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is a next one.
    Again,
    /// The request is answered.
    Done(Status),
}

/// How a range is zeroed, from the cheapest way to the one that always works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroBy {
    Punching,
    Marking,
    Writing,
}

#[derive(Debug)]
enum Work {
    Read {
        into: GuestVectors,
        offset: u64,
    },
    Write {
        from: GuestVectors,
        offset: u64,
    },
    Flush,
    Discard(Vec<Extent>),
    WriteZeroes {
        /// The last one is being worked on.
        extents: Vec<Extent>,
        by: ZeroBy,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Job {
    /// Head of the chain to give back.
    pub(super) head: u16,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// Data bytes in the chain's writable part.
    pub(super) writable: usize,
    data: usize,
    durable: bool,
    work: Work,
    lease: Lease,
}

impl Job {
    /// `data` holds the chain's data; `durable` when writes must be stable once completed.
    pub(super) fn new(
        head: u16,
        status: GuestAddress,
        kind: Kind,
        data: GuestVectors,
        durable: bool,
        lease: Lease,
    ) -> Self {
        let bytes = data.len();
        let writable = if matches!(kind, Kind::Read { .. }) {
            bytes
        } else {
            0
        };
        let work = match kind {
            Kind::Read { offset } => Work::Read { into: data, offset },
            Kind::Write { offset } => Work::Write { from: data, offset },
            Kind::Flush | Kind::GetId => Work::Flush,
            Kind::Discard(extents) => Work::Discard(extents),
            Kind::WriteZeroes(extents) => Work::WriteZeroes {
                by: first_way(&extents),
                extents,
            },
        };
        Self {
            head,
            status,
            writable,
            data: bytes,
            durable,
            work,
            lease,
        }
    }

    pub(super) fn backing(&self) -> Option<&Backing> {
        self.lease.backing()
    }

    /// What to run now; `None` when nothing is left.
    pub(super) fn operation(&self) -> Option<Operation<'_>> {
        let durable = self.durable;
        match &self.work {
            Work::Read { into, offset } => (into.len() > 0).then_some(Operation::Read {
                into,
                offset: *offset,
            }),
            Work::Write { from, offset } => (from.len() > 0).then_some(Operation::Write {
                from,
                offset: *offset,
                durable,
            }),
            Work::Flush => Some(Operation::Flush),
            Work::Discard(extents) => extents.last().map(|extent| Operation::Discard {
                offset: extent.offset,
                len: extent.len,
            }),
            Work::WriteZeroes { extents, by } => {
                extents.last().map(|extent| zero(extent, *by, durable))
            }
        }
    }

    /// Takes the result of [`Job::operation`], in bytes for transfers.
    pub(super) fn completed(&mut self, result: io::Result<usize>) -> Step {
        let done = match result {
            Ok(done) => done,
            Err(err) => return self.failed(&err),
        };
        let moved = u64::try_from(done).unwrap_or(0);
        match &mut self.work {
            Work::Read { into: data, offset } | Work::Write { from: data, offset } => {
                if done == 0 {
                    // The file has been cut since the capacity was read, or the disk is full.
                    return Step::Done(Status::IoError);
                }
                data.advance(done);
                *offset = offset.saturating_add(moved);
            }
            Work::Flush => return Step::Done(Status::Ok),
            Work::Discard(extents) => drop(extents.pop()),
            Work::WriteZeroes { extents, by } => {
                let left = match (*by, extents.last_mut()) {
                    (ZeroBy::Writing, Some(extent)) => {
                        if done == 0 {
                            return Step::Done(Status::IoError);
                        }
                        extent.offset = extent.offset.saturating_add(moved);
                        extent.len = extent.len.saturating_sub(moved);
                        extent.len
                    }
                    _ => 0,
                };
                if left == 0 {
                    extents.pop();
                    *by = first_way(extents);
                }
            }
        }
        self.next()
    }

    /// The step for a job that has not run anything yet.
    pub(super) fn next(&self) -> Step {
        if self.operation().is_some() {
            Step::Again
        } else {
            Step::Done(Status::Ok)
        }
    }

    fn failed(&mut self, err: &io::Error) -> Step {
        let unsupported = matches!(
            err.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS | libc::EINVAL)
        );
        match &mut self.work {
            _ if err.kind() == io::ErrorKind::Interrupted => Step::Again,
            Work::Discard(_) if unsupported => Step::Done(Status::Unsupported),
            Work::WriteZeroes { by, .. } if unsupported && *by != ZeroBy::Writing => {
                *by = match by {
                    ZeroBy::Punching => ZeroBy::Marking,
                    _ => ZeroBy::Writing,
                };
                Step::Again
            }
            work => {
                let what = match work {
                    Work::Read { .. } => "read",
                    Work::Write { .. } => "write",
                    Work::Flush => "flush",
                    Work::Discard(_) => "discard",
                    Work::WriteZeroes { .. } => "write zeroes",
                };
                let disk = self.lease.backing().map(Backing::path);
                tracing::warn!(?disk, %err, "cannot {what}");
                Step::Done(Status::IoError)
            }
        }
    }

    /// The step of a job when the device is being reset: one that still has to write many
    /// zeroes is told off, and drivers then write them themselves.
    pub(super) fn cut_short(&self, step: Step) -> Step {
        match (step, self.operation()) {
            (Step::Again, Some(Operation::Fill { .. })) => Step::Done(Status::Unsupported),
            _ => step,
        }
    }

    /// Counts a finished job.
    pub(super) fn count(&self, status: Status, counters: &Counters) {
        if status != Status::Ok {
            Counters::add(&counters.errors, 1);
            return;
        }
        match self.work {
            Work::Read { .. } => {
                Counters::add(&counters.reads, 1);
                Counters::add(&counters.read_bytes, self.data);
            }
            Work::Write { .. } => {
                Counters::add(&counters.writes, 1);
                Counters::add(&counters.written_bytes, self.data);
            }
            Work::Flush => Counters::add(&counters.flushes, 1),
            Work::Discard(_) | Work::WriteZeroes { .. } => {}
        }
    }
}

/// Without `unmap` the range must stay allocated (5.2.6).
fn first_way(extents: &[Extent]) -> ZeroBy {
    if extents.last().is_some_and(|extent| extent.unmap) {
        ZeroBy::Punching
    } else {
        ZeroBy::Marking
    }
}

fn zero(extent: &Extent, by: ZeroBy, durable: bool) -> Operation<'static> {
    const { assert!(MAX_WRITE_ZEROES_SECTORS as u64 * SECTOR_BYTES <= 32 << 20) };
    let (offset, len) = (extent.offset, extent.len);
    let mode = match by {
        ZeroBy::Punching => libc::FALLOC_FL_PUNCH_HOLE,
        ZeroBy::Marking => libc::FALLOC_FL_ZERO_RANGE,
        ZeroBy::Writing => {
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROES.len());
            return Operation::Fill {
                data: ZEROES.get(..now).unwrap_or_default(),
                offset,
                durable,
            };
        }
    };
    Operation::Allocate {
        mode: mode | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    }
}
