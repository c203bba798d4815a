//! When half-done things have to be given up, on one timerfd.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Points in time, each with the number of what expires.
#[derive(Debug)]
pub struct Deadlines {
    timer: TimerFd,
    entries: BTreeSet<(Instant, u64)>,
    armed: Option<Instant>,
}

impl Deadlines {
    /// Without deadlines.
    ///
    /// # Errors
    /// When there are no more fds.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            entries: BTreeSet::new(),
            armed: None,
        })
    }

    /// Readable when something may have expired.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// Adds a deadline.
    pub fn add(&mut self, at: Instant, id: u64) {
        self.entries.insert((at, id));
    }

    /// Removes a deadline; one that is not there is ignored.
    pub fn remove(&mut self, at: Instant, id: u64) {
        self.entries.remove(&(at, id));
    }

    /// Takes one that has expired by `now`.
    pub fn pop_expired(&mut self, now: Instant) -> Option<u64> {
        let &(at, id) = self.entries.first()?;
        if at > now {
            return None;
        }
        self.entries.pop_first();
        Some(id)
    }

    /// Acknowledges the timer's readiness.
    pub fn acknowledge(&mut self) {
        // Readable again until the next `arm`, if this fails; `arm` rewrites it anyway.
        let _ = self.timer.wait();
        self.armed = None;
    }

    /// Sets the timer to the first deadline.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub fn arm(&mut self) -> io::Result<()> {
        let first = self.entries.first().map(|&(at, _)| at);
        if first == self.armed {
            return Ok(());
        }
        match first {
            None => self.timer.unset()?,
            Some(at) => {
                // Zero would disarm the timer.
                let left = at
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_micros(1));
                self.timer.set(
                    Expiration::OneShot(TimeSpec::from_duration(left)),
                    TimerSetTimeFlags::empty(),
                )?;
            }
        }
        self.armed = first;
        Ok(())
    }
}
