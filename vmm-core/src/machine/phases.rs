//! When a machine reached which point of its start.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Points in time since the machine began to be built, in the order in which they were
/// reached.
#[derive(Debug)]
pub(crate) struct Phases {
    begin: Instant,
    reached: Mutex<Vec<(&'static str, Duration)>>,
}

impl Phases {
    /// Only of a restored machine: a booted one has it made later.
    pub(crate) const VM_CREATED: &'static str = "vm created";
    pub(crate) const MEMORY_MAPPED: &'static str = "memory mapped";
    pub(crate) const DEVICES_ATTACHED: &'static str = "devices attached";
    pub(crate) const STATE_RESTORED: &'static str = "state restored";
    pub(crate) const VM_BUILT: &'static str = "vm built";
    pub(crate) const KERNEL_ENTERED: &'static str = "kernel entered";

    pub(crate) fn begin() -> Self {
        Self {
            begin: Instant::now(),
            reached: Mutex::new(Vec::new()),
        }
    }

    /// Now, unless it was reached before.
    pub(crate) fn mark_first(&self, phase: &'static str) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if reached.iter().all(|(name, _)| *name != phase) {
            reached.push((phase, self.begin.elapsed()));
        }
    }

    pub(crate) fn all(&self) -> Vec<(&'static str, Duration)> {
        self.reached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
