//! Configuration space: reading it, and telling the driver that it changed.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Interrupt;

/// Copies from `config` at `offset`; past its end reads as zero.
pub(crate) fn read(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    data.fill(0);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// The interrupt of the current activation, for handles that outlive activations.
#[derive(Debug, Default)]
pub(crate) struct ConfigChange(Mutex<Listener>);

/// Who learns of a change.
#[derive(Debug, Default)]
enum Listener {
    /// Nobody: a driver reads the new values when it starts.
    #[default]
    None,
    /// A driver whose device stands still, as soon as that goes on.
    Later {
        /// There was a change.
        pending: bool,
    },
    /// A driver, now.
    Driver(Arc<dyn Interrupt>),
}

impl ConfigChange {
    /// The device runs.
    ///
    /// # Errors
    /// As [`Interrupt::config_changed`], for a change while it stood still.
    pub(crate) fn arm(&self, interrupt: Arc<dyn Interrupt>) -> io::Result<()> {
        let mut listener = self.lock();
        let told = match *listener {
            Listener::Later { pending: true } => interrupt.config_changed(),
            _ => Ok(()),
        };
        *listener = Listener::Driver(interrupt);
        told
    }

    /// The driver is gone.
    pub(crate) fn disarm(&self) {
        *self.lock() = Listener::None;
    }

    /// The device stands still, if it ran.
    pub(crate) fn suspend(&self) {
        let listener = &mut *self.lock();
        if let Listener::Driver(_) = listener {
            *listener = Listener::Later { pending: false };
        }
    }

    /// The device was restored, and has changed since it was saved or not.
    pub(crate) fn restored(&self, changed: bool) {
        *self.lock() = Listener::Later { pending: changed };
    }

    /// Whether there was a change since the device stands still.
    pub(crate) fn is_pending(&self) -> bool {
        matches!(*self.lock(), Listener::Later { pending: true })
    }

    /// Interrupts the driver, at once or when its device goes on; one that is not there yet
    /// reads the new values when it starts.
    ///
    /// # Errors
    /// As [`Interrupt::config_changed`].
    pub(crate) fn notify(&self) -> io::Result<()> {
        let interrupt = match &mut *self.lock() {
            Listener::None => return Ok(()),
            Listener::Later { pending } => {
                *pending = true;
                return Ok(());
            }
            Listener::Driver(interrupt) => Arc::clone(interrupt),
        };
        interrupt.config_changed()
    }

    fn lock(&self) -> MutexGuard<'_, Listener> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestInterrupt;

    #[test]
    fn a_change_while_the_device_stands_still_is_told_when_it_goes_on() {
        let interrupt = Arc::new(TestInterrupt::default());
        let change = ConfigChange::default();
        let told = |change: &ConfigChange| {
            let before = interrupt.config_count();
            change.arm(interrupt.clone()).unwrap();
            interrupt.config_count() - before
        };
        change.notify().unwrap();
        change.suspend();
        assert_eq!(told(&change), 0, "nobody was there");
        change.suspend();
        assert_eq!(told(&change), 0);
        change.suspend();
        change.notify().unwrap();
        change.suspend();
        assert!(change.is_pending());
        assert_eq!(told(&change), 1);
        assert!(!change.is_pending());
        change.suspend();
        change.notify().unwrap();
        change.disarm();
        assert_eq!(told(&change), 0, "its driver is gone");
        change.restored(true);
        assert_eq!(told(&change), 1);
        change.restored(false);
        assert_eq!(told(&change), 0);
        change.notify().unwrap();
        assert_eq!(interrupt.config_count(), 3);
    }

    #[test]
    fn reads_within_across_and_past_the_end() {
        let config = [1, 2, 3, 4];
        let at = |offset, len| {
            let mut data = vec![0xff; len];
            read(&config, offset, &mut data);
            data
        };
        assert_eq!(at(0, 4), [1, 2, 3, 4]);
        assert_eq!(at(2, 4), [3, 4, 0, 0]);
        assert_eq!(at(4, 1), [0]);
        assert_eq!(at(u64::MAX, 2), [0, 0]);
    }
}
