use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{CONFIG_CHANGE, USED_BUFFER};
use crate::virtio::Interrupt;

/// Needed resets of one device that are logged.
const MAX_REPORTS: u32 = 8;

/// A wire to the interrupt controller, edge-triggered.
pub trait IrqLine: Send + Sync + fmt::Debug {
    /// Sends one edge.
    ///
    /// # Errors
    /// When it cannot be delivered.
    fn trigger(&self) -> io::Result<()>;
}

impl IrqLine for EventFd {
    fn trigger(&self) -> io::Result<()> {
        match self.write(1) {
            // The counter is full: an edge is under way that nobody has seen yet.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// The interrupt registers in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InterruptState {
    pub(super) status: u32,
    pub(super) generation: u32,
    pub(super) needs_reset: bool,
}

/// The device's side of the interrupt registers. Takes no lock: device threads use it
/// while a vCPU holds the transport's.
#[derive(Debug)]
pub(super) struct MmioInterrupt {
    device: &'static str,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Of needed resets, for the log.
    reports: AtomicU32,
    line: Arc<dyn IrqLine>,
}

impl MmioInterrupt {
    pub(super) fn new(device: &'static str, line: Arc<dyn IrqLine>) -> Self {
        Self {
            device,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            reports: AtomicU32::new(0),
            line,
        }
    }

    /// `InterruptStatus`.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// `ConfigGeneration`.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub(super) fn wants_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The driver reset the device.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// What a snapshot keeps.
    pub(super) fn save(&self) -> InterruptState {
        InterruptState {
            status: self.status(),
            generation: self.generation(),
            needs_reset: self.wants_reset(),
        }
    }

    /// Back to what a snapshot kept.
    pub(super) fn restore(&self, state: &InterruptState) {
        self.status.store(state.status, Ordering::SeqCst);
        self.generation.store(state.generation, Ordering::SeqCst);
        self.needs_reset.store(state.needs_reset, Ordering::SeqCst);
    }

    /// Sends the edge of what is pending once more: it may have been lost on its way.
    pub(super) fn repeat(&self) -> io::Result<()> {
        if self.status() == 0 {
            return Ok(());
        }
        self.line.trigger()
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.trigger()
    }
}

impl Interrupt for MmioInterrupt {
    fn used_queue(&self, _queue: u16) -> io::Result<()> {
        self.raise(USED_BUFFER)
    }

    fn config_changed(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE)
    }

    fn needs_reset(&self, reason: &str) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            // A guest that does this on purpose must not fill the log.
            if self.reports.fetch_add(1, Ordering::Relaxed) < MAX_REPORTS {
                tracing::warn!(device = self.device, reason, "device needs a reset");
            }
            // Nobody is left to tell when this fails, too.
            let _ = self.raise(CONFIG_CHANGE);
        }
    }
}
