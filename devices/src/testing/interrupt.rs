use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use super::PATIENCE;
use crate::virtio::Interrupt;

/// Records what a device told its driver.
#[derive(Debug, Default)]
pub struct TestInterrupt {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: BTreeMap<u16, u64>,
    config: u64,
    needs_reset: Option<String>,
}

impl TestInterrupt {
    /// Used-buffer notifications so far for `queue`.
    #[must_use]
    pub fn used_count(&self, queue: u16) -> u64 {
        self.lock().used.get(&queue).copied().unwrap_or(0)
    }

    /// Configuration change notifications so far.
    #[must_use]
    pub fn config_count(&self) -> u64 {
        self.lock().config
    }

    /// Why the device asked for a reset, if it did.
    #[must_use]
    pub fn needs_reset_reason(&self) -> Option<String> {
        self.lock().needs_reset.clone()
    }

    /// Waits until `done` holds, checking after every notification; false after
    /// [`PATIENCE`].
    pub fn wait_until(&self, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = self.total(&self.lock());
            if done(self) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let state = self.lock();
            // Nothing may have been missed between the check and the lock.
            let _ = self
                .changed
                .wait_timeout_while(state, left, |state| self.total(state) == seen)
                .unwrap();
        }
    }

    fn total(&self, state: &State) -> u64 {
        state.used.values().sum::<u64>() + state.config + u64::from(state.needs_reset.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Interrupt for TestInterrupt {
    fn used_queue(&self, queue: u16) -> io::Result<()> {
        *self.lock().used.entry(queue).or_default() += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn config_changed(&self) -> io::Result<()> {
        self.lock().config += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn needs_reset(&self, reason: &str) {
        self.lock()
            .needs_reset
            .get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }
}
