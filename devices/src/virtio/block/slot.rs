//! What is attached to a device, and who is using it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::engine::EngineChoice;
use super::{Backing, SECTOR_BYTES};
use crate::virtio::config::ConfigChange;

/// A backing cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Something is attached, or requests on the last backing are still in flight.
    #[error("the disk slot is in use: detach what it holds first")]
    Occupied,
    /// A read-only backing on a writable device: the driver would only find out by failed
    /// writes.
    #[error("disk {0} was opened read-only, the slot is writable: use a read-only slot")]
    ReadOnly(String),
    /// Direct I/O needs larger blocks than the device offers.
    #[error("disk {path} needs I/O in blocks of {needed} bytes, the slot has {offered}")]
    Alignment {
        /// The backing.
        path: String,
        /// Its alignment.
        needed: u32,
        /// The device's logical block size.
        offered: u32,
    },
    /// The driver could not be told. The backing is attached.
    #[error("cannot tell the guest about the disk: {0}")]
    Notify(#[source] io::Error),
}

/// A backing is not (completely) detached.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Nothing is attached.
    #[error("the disk slot is empty")]
    Empty,
    /// New requests fail, but these are still running; the file is closed after the last.
    #[error("{0} requests to the disk have not finished in time")]
    InFlight(usize),
    /// The driver could not be told. The backing is detached.
    #[error("cannot tell the guest about the disk: {0}")]
    Notify(#[source] io::Error),
}

/// Counts since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) errors: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(u64::try_from(amount).unwrap_or(0), Ordering::Relaxed);
    }
}

/// Shared by the device, its queues and its handles.
#[derive(Debug)]
pub(super) struct Slot {
    state: Mutex<State>,
    idle: Condvar,
    /// Capacity in sectors as the configuration space shows it.
    sectors: AtomicU64,
    pub(super) change: ConfigChange,
    pub(super) counters: Counters,
    block_size: u32,
    read_only: bool,
    engine: EngineChoice,
}

#[derive(Debug, Default)]
struct State {
    backing: Option<Arc<Backing>>,
    /// Leases of this backing or the one before it.
    leases: usize,
}

impl Slot {
    pub(super) fn new(block_size: u32, read_only: bool, engine: EngineChoice) -> Self {
        Self {
            state: Mutex::default(),
            idle: Condvar::new(),
            sectors: AtomicU64::new(0),
            change: ConfigChange::default(),
            counters: Counters::default(),
            block_size,
            read_only,
            engine,
        }
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// The backing for one request, if there is one.
    pub(super) fn lease(self: &Arc<Self>) -> Option<Lease> {
        let mut state = self.lock();
        let backing = Arc::clone(state.backing.as_ref()?);
        state.leases = state.leases.saturating_add(1);
        Some(Lease {
            slot: Arc::clone(self),
            backing: Some(backing),
        })
    }

    /// The device is gone: closes the backing.
    pub(super) fn close(&self) {
        self.sectors.store(0, Ordering::Release);
        let taken = self.lock().backing.take();
        drop(taken);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, backing: &Backing) -> Result<(), AttachError> {
        let path = || backing.path().display().to_string();
        if !backing.is_writable() && !self.read_only {
            return Err(AttachError::ReadOnly(path()));
        }
        if backing.alignment() > self.block_size {
            return Err(AttachError::Alignment {
                path: path(),
                needed: backing.alignment(),
                offered: self.block_size,
            });
        }
        Ok(())
    }
}

/// Keeps a backing open and attached for one request.
#[derive(Debug)]
pub(super) struct Lease {
    slot: Arc<Slot>,
    /// `None` only while dropping.
    backing: Option<Arc<Backing>>,
}

impl Lease {
    pub(super) fn backing(&self) -> Option<&Backing> {
        self.backing.as_deref()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Before the count falls: who waits for it may rely on the file being closed.
        self.backing = None;
        let mut state = self.slot.lock();
        state.leases = state.leases.saturating_sub(1);
        if state.leases == 0 {
            self.slot.idle.notify_all();
        }
    }
}

/// Controls a block device from outside its VM. Clones control the same device.
#[derive(Clone, Debug)]
pub struct BlockHandle {
    slot: Arc<Slot>,
}

impl BlockHandle {
    pub(super) fn new(slot: Arc<Slot>) -> Self {
        Self { slot }
    }

    /// Gives the device a backing; the driver sees its capacity at once.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, backing: Backing) -> Result<(), AttachError> {
        self.slot.check(&backing)?;
        {
            let mut state = self.slot.lock();
            if state.backing.is_some() || state.leases > 0 {
                return Err(AttachError::Occupied);
            }
            self.slot
                .sectors
                .store(backing.sectors(), Ordering::Release);
            state.backing = Some(Arc::new(backing));
        }
        self.slot.change.notify().map_err(AttachError::Notify)
    }

    /// Takes the backing away: the capacity becomes zero, new requests fail, and those in
    /// flight are waited for, at most until `deadline` from now. On success the file is
    /// closed. Blocks: not for async code.
    ///
    /// # Errors
    /// See [`DetachError`].
    pub fn detach(&self, deadline: Duration) -> Result<(), DetachError> {
        let taken = {
            let mut state = self.slot.lock();
            self.slot.sectors.store(0, Ordering::Release);
            state.backing.take()
        };
        // Closes the file unless requests use it.
        drop(taken.ok_or(DetachError::Empty)?);
        let told = self.slot.change.notify();
        let (state, _) = self
            .slot
            .idle
            .wait_timeout_while(self.slot.lock(), deadline, |state| state.leases > 0)
            .unwrap_or_else(PoisonError::into_inner);
        if state.leases > 0 {
            return Err(DetachError::InFlight(state.leases));
        }
        told.map_err(DetachError::Notify)
    }

    /// Reads the backing's size again and shows it to the driver. Returns the capacity in
    /// bytes.
    ///
    /// # Errors
    /// `NotFound` when nothing is attached; as stat(2) or the interrupt.
    pub fn resize(&self) -> io::Result<u64> {
        let sectors = {
            let state = self.slot.lock();
            let backing = state
                .backing
                .as_ref()
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the disk slot is empty"))?;
            backing.measure()?;
            self.slot
                .sectors
                .store(backing.sectors(), Ordering::Release);
            backing.sectors()
        };
        self.slot.change.notify()?;
        Ok(sectors.saturating_mul(SECTOR_BYTES))
    }

    /// Whether something is attached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.slot.lock().backing.is_some()
    }

    /// Capacity in bytes as the driver sees it.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.slot.sectors().saturating_mul(SECTOR_BYTES)
    }

    /// How requests are run, and why.
    #[must_use]
    pub fn engine(&self) -> &EngineChoice {
        &self.slot.engine
    }

    /// Counts since the device was made.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        let counters = &self.slot.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockStats {
            reads: get(&counters.reads),
            writes: get(&counters.writes),
            read_bytes: get(&counters.read_bytes),
            written_bytes: get(&counters.written_bytes),
            flushes: get(&counters.flushes),
            errors: get(&counters.errors),
        }
    }
}
