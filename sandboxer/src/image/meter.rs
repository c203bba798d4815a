//! Counts what is read of a layer, and stops at its bounds.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use super::store::UnpackControl;

/// Why reading was stopped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stop {
    Cancelled,
    Bytes,
    Header,
}

/// Counts what is read of a layer; bounds headers, which the tar reader keeps in memory.
pub(super) struct Meter {
    max_bytes: u64,
    pub(super) taken: Cell<u64>,
    /// `None` while content is read.
    pub(super) header_left: Cell<Option<u64>>,
    pub(super) stopped: Cell<Option<Stop>>,
}

impl Meter {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            taken: Cell::new(0),
            header_left: Cell::new(None),
            stopped: Cell::new(None),
        }
    }

    pub(super) fn left(&self) -> u64 {
        self.max_bytes.saturating_sub(self.taken.get())
    }

    fn stop(&self, why: Stop) -> io::Error {
        self.stopped.set(Some(why));
        io::Error::other("stopped")
    }

    fn take(&self, count: u64) -> io::Result<()> {
        self.taken.set(self.taken.get().saturating_add(count));
        if self.taken.get() > self.max_bytes {
            return Err(self.stop(Stop::Bytes));
        }
        if let Some(left) = self.header_left.get() {
            let Some(left) = left.checked_sub(count) else {
                return Err(self.stop(Stop::Header));
            };
            self.header_left.set(Some(left));
        }
        Ok(())
    }
}

/// Reads through a [`Meter`].
pub(super) struct Metered<'a> {
    pub(super) inner: &'a mut dyn Read,
    pub(super) meter: Rc<Meter>,
    pub(super) control: &'a UnpackControl<'a>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.control.is_cancelled() {
            return Err(self.meter.stop(Stop::Cancelled));
        }
        let read = self.inner.read(buf)?;
        self.meter.take(u64::try_from(read).unwrap_or(u64::MAX))?;
        Ok(read)
    }
}
