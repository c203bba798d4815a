//! What a VMM tells by itself, for whoever waits for it.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::VmError;

use crate::hypervisor::{GuestEnd, HvError};

/// The news of one VMM.
#[derive(Debug, Default)]
pub(crate) struct Told {
    guest_end: Mutex<Option<GuestEnd>>,
    /// Ids of devices that the guest has let go of.
    removed: watch::Sender<Vec<String>>,
}

impl Told {
    /// How the guest ended; what was told first stays, except that a panic says more.
    pub(crate) fn ended(&self, end: GuestEnd) {
        let mut known = self
            .guest_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.is_none() || end == GuestEnd::Panicked {
            *known = Some(end);
        }
    }

    /// How the guest ended.
    pub(crate) fn guest_end(&self) -> Option<GuestEnd> {
        *self
            .guest_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has let go of a device.
    pub(crate) fn removed(&self, device: String) {
        self.removed.send_modify(|ids| ids.push(device));
    }

    /// Asks the VMM by `request` to have the guest let go of `device`, and waits until it has.
    pub(crate) async fn removal(
        &self,
        device: &str,
        limit: Duration,
        request: impl Future<Output = Result<(), HvError>>,
    ) -> Result<(), VmError> {
        let forget = || {
            self.removed
                .send_modify(|ids| ids.retain(|id| id != device));
        };
        // An earlier device of this name may have gone late.
        forget();
        request.await?;
        let mut removed = self.removed.subscribe();
        let gone = removed.wait_for(|ids| ids.iter().any(|id| id == device));
        if timeout(limit, gone).await.is_err() {
            return Err(VmError::Deadline {
                what: "the guest to let go of a device",
                limit,
            });
        }
        forget();
        Ok(())
    }
}
