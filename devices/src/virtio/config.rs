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
pub(crate) struct ConfigChange(Mutex<Option<Arc<dyn Interrupt>>>);

impl ConfigChange {
    pub(crate) fn arm(&self, interrupt: Arc<dyn Interrupt>) {
        *self.lock() = Some(interrupt);
    }

    pub(crate) fn disarm(&self) {
        *self.lock() = None;
    }

    /// Interrupts the driver; one that is not there yet reads the new values when it
    /// starts.
    ///
    /// # Errors
    /// As [`Interrupt::config_changed`].
    pub(crate) fn notify(&self) -> io::Result<()> {
        let interrupt = self.lock().clone();
        interrupt.map_or(Ok(()), |interrupt| interrupt.config_changed())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
