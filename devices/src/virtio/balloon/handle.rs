//! The host's side of the balloon, from any thread.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BalloonStats;
use crate::virtio::config::ConfigChange;
use crate::virtio::release::PAGE_BYTES;

/// What the guest said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes in the balloon: memory the guest does not use.
    pub actual_bytes: u64,
    /// Memory statistics; empty until the first arrive.
    pub stats: BalloonStats,
    /// How many times statistics have arrived: tells new ones from equal old ones.
    pub stats_count: u64,
    /// Bytes of pages released since the device was made, inflated and reported ones
    /// together. Pages that the guest used again count again.
    pub released_bytes: u64,
}

/// Why the balloon refused.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// More than the guest has.
    #[error("balloon target {target_bytes} is more than the guest's memory, {memory_bytes} bytes")]
    TooLarge {
        /// What was asked for.
        target_bytes: u64,
        /// What there is.
        memory_bytes: u64,
    },
    /// The driver has not agreed to statistics, or there is none.
    #[error("the guest's balloon driver sends no statistics")]
    NoStats,
    /// The driver cannot be told.
    #[error("cannot notify the balloon driver")]
    Notify(#[source] io::Error),
}

/// Controls one balloon; clones share it. Survives resets of the device.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    pub(super) shared: Arc<Shared>,
}

/// What the handle, the device (config space) and its handler (queues) share.
#[derive(Debug)]
pub(super) struct Shared {
    memory_bytes: u64,
    /// Kept in pages, as config space has it.
    target: AtomicU32,
    status: watch::Sender<BalloonStatus>,
    pub(super) config_change: ConfigChange,
    /// Wakes the handler to give the statistics buffer back.
    stats_wanted: EventFd,
    stats_agreed: AtomicBool,
    /// One target at a time: value and interrupt belong together.
    setting: Mutex<()>,
}

impl BalloonHandle {
    /// Asks the guest to give `bytes` (whole pages, rounded down) to the host; less than
    /// before gives memory back to it. The guest follows in its own time, and only as far
    /// as it can: watch [`BalloonHandle::subscribe`].
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`], [`BalloonError::Notify`].
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        let pages = self.shared.check_target(bytes)?;
        let _setting = self.shared.lock_setting();
        if self.shared.target.swap(pages, Ordering::AcqRel) == pages {
            return Ok(());
        }
        self.shared
            .config_change
            .notify()
            .map_err(BalloonError::Notify)
    }

    /// The target in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        pages_to_bytes(self.shared.target_pages())
    }

    /// Bytes in the balloon, as the guest says.
    #[must_use]
    pub fn actual(&self) -> u64 {
        self.shared.status.borrow().actual_bytes
    }

    /// Everything the guest said last.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        *self.shared.status.borrow()
    }

    /// Follows [`BalloonHandle::status`].
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<BalloonStatus> {
        self.shared.status.subscribe()
    }

    /// Asks the guest for new statistics; they arrive in [`BalloonHandle::subscribe`].
    ///
    /// # Errors
    /// [`BalloonError::NoStats`], [`BalloonError::Notify`].
    pub fn request_stats(&self) -> Result<(), BalloonError> {
        if !self.shared.stats_agreed.load(Ordering::Acquire) {
            return Err(BalloonError::NoStats);
        }
        match self.shared.stats_wanted.write(1) {
            // A full counter wakes the handler just as well.
            Err(err) if err.kind() != io::ErrorKind::WouldBlock => Err(BalloonError::Notify(err)),
            _ => Ok(()),
        }
    }
}

impl Shared {
    pub(super) fn new(memory_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            memory_bytes,
            target: AtomicU32::new(0),
            status: watch::Sender::default(),
            config_change: ConfigChange::default(),
            stats_wanted: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stats_agreed: AtomicBool::new(false),
            setting: Mutex::new(()),
        })
    }

    /// `bytes` in pages.
    pub(super) fn check_target(&self, bytes: u64) -> Result<u32, BalloonError> {
        u32::try_from(bytes / PAGE_BYTES)
            .ok()
            .filter(|_| bytes <= self.memory_bytes)
            .ok_or(BalloonError::TooLarge {
                target_bytes: bytes,
                memory_bytes: self.memory_bytes,
            })
    }

    pub(super) fn set_target_pages(&self, pages: u32) {
        self.target.store(pages, Ordering::Release);
    }

    pub(super) fn target_pages(&self) -> u32 {
        self.target.load(Ordering::Acquire)
    }

    /// Config space has 32 bits, so this always fits.
    pub(super) fn actual_pages(&self) -> u32 {
        u32::try_from(self.status.borrow().actual_bytes / PAGE_BYTES).unwrap_or(u32::MAX)
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        let actual_bytes = pages_to_bytes(pages);
        self.status.send_if_modified(|status| {
            std::mem::replace(&mut status.actual_bytes, actual_bytes) != actual_bytes
        });
    }

    pub(super) fn set_stats(&self, stats: BalloonStats) {
        self.status.send_modify(|status| {
            status.stats = stats;
            status.stats_count = status.stats_count.wrapping_add(1);
        });
    }

    pub(super) fn add_released(&self, bytes: u64) {
        self.status.send_modify(|status| {
            status.released_bytes = status.released_bytes.saturating_add(bytes);
        });
    }

    pub(super) fn set_stats_agreed(&self, agreed: bool) {
        self.stats_agreed.store(agreed, Ordering::Release);
    }

    pub(super) fn stats_wanted(&self) -> io::Result<EventFd> {
        self.stats_wanted.try_clone()
    }

    fn lock_setting(&self) -> MutexGuard<'_, ()> {
        self.setting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages_to_bytes(pages: u32) -> u64 {
    u64::from(pages).saturating_mul(PAGE_BYTES)
}
