//! How often a vCPU left the guest for this process, and why.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::vm::ExitCounts;

/// Kinds of exits that are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ExitKind {
    /// Port I/O.
    Io,
    /// Memory-mapped I/O.
    Mmio,
    /// A signal: pause, stop, or one meant for the process.
    Interrupted,
    /// Everything else.
    Other,
}

/// Counters of one vCPU; written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct ExitCounters {
    io: AtomicU64,
    mmio: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

impl ExitCounters {
    pub(crate) fn count(&self, kind: ExitKind) {
        let counter = match kind {
            ExitKind::Io => &self.io,
            ExitKind::Mmio => &self.mmio,
            ExitKind::Interrupted => &self.interrupted,
            ExitKind::Other => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds this vCPU's counts to `sums`.
    pub(crate) fn add_to(&self, sums: &mut ExitCounts) {
        for (name, counter) in [
            ("io", &self.io),
            ("mmio", &self.mmio),
            ("interrupted", &self.interrupted),
            ("other", &self.other),
        ] {
            let sum = sums.entry(name).or_default();
            *sum = sum.saturating_add(counter.load(Ordering::Relaxed));
        }
    }
}
