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
    /// What has happened and nobody has waited for yet: ids of devices that the guest has let
    /// go of, names of events.
    happened: watch::Sender<Vec<String>>,
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

    /// The guest has let go of a device, or an event of this name came.
    pub(crate) fn happened(&self, what: String) {
        self.happened.send_modify(|all| all.push(what));
    }

    /// Asks the VMM by `request` to have the guest let go of `device`, and waits until it has.
    pub(crate) async fn removal(
        &self,
        device: &str,
        limit: Duration,
        request: impl Future<Output = Result<(), HvError>>,
    ) -> Result<(), VmError> {
        let what = "the guest to let go of a device";
        self.after(device, what, limit, request).await
    }

    /// Does `request`, and waits until `name` has happened, described by `what` in errors.
    pub(crate) async fn after(
        &self,
        name: &str,
        what: &'static str,
        limit: Duration,
        request: impl Future<Output = Result<(), HvError>>,
    ) -> Result<(), VmError> {
        let forget = || {
            self.happened
                .send_modify(|all| all.retain(|other| other != name));
        };
        // An earlier one of this name may have come late.
        forget();
        request.await?;
        let mut happened = self.happened.subscribe();
        let done = happened.wait_for(|all| all.iter().any(|other| other == name));
        if timeout(limit, done).await.is_err() {
            return Err(VmError::Deadline { what, limit });
        }
        forget();
        Ok(())
    }
}
