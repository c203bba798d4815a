//! The end of a machine: told once, seen by everyone.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use devices::legacy::ConsoleOutput;
use tokio::sync::watch;

use crate::vcpu::VcpuGroup;
use crate::vm::ExitReason;

/// How Linux begins the last words of a panic.
const PANIC_MARK: &str = "Kernel panic";
/// Most bytes of a panic's console output kept in the reason.
const PANIC_BYTES: usize = 2048;

/// Through which every part of a machine reports its end. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ExitNotice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reason: watch::Sender<Option<ExitReason>>,
    vcpus: Mutex<Weak<VcpuGroup>>,
    console: OnceLock<ConsoleOutput>,
}

impl ExitNotice {
    pub(crate) fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                reason: watch::Sender::new(None),
                vcpus: Mutex::new(Weak::new()),
                console: OnceLock::new(),
            }),
        }
    }

    /// Whose vCPUs stop when the machine ends.
    pub(crate) fn stops(&self, vcpus: &Arc<VcpuGroup>) {
        *self
            .inner
            .vcpus
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(vcpus);
    }

    /// Where the guest's last words are.
    pub(crate) fn reads(&self, console: &ConsoleOutput) {
        let _ = self.inner.console.set(console.clone());
    }

    /// The machine ends because of `reason`; the first reason stays. Stops the vCPUs
    /// without waiting for them.
    pub(crate) fn report(&self, reason: ExitReason) {
        let reason = self.explain(reason);
        let first = self.inner.reason.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(reason);
            }
            first
        });
        if first {
            let vcpus = self
                .inner
                .vcpus
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .upgrade();
            if let Some(vcpus) = vcpus {
                vcpus.request_stop();
            }
        }
    }

    /// A guest that panics resets itself: what it wrote tells the difference.
    fn explain(&self, reason: ExitReason) -> ExitReason {
        if !matches!(reason, ExitReason::GuestReset | ExitReason::TripleFault) {
            return reason;
        }
        let words = self
            .inner
            .console
            .get()
            .and_then(|console| panic_words(&console.tail()));
        words.map_or(reason, ExitReason::GuestPanic)
    }

    pub(crate) fn get(&self) -> Option<ExitReason> {
        self.inner.reason.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<ExitReason>> {
        self.inner.reason.subscribe()
    }
}

/// The last words of a Linux kernel that panicked, if its console holds any.
#[must_use]
pub fn panic_words(console: &str) -> Option<String> {
    let (_, words) = console.split_at(console.find(PANIC_MARK)?);
    let mut end = words.len().min(PANIC_BYTES);
    while !words.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    Some(words.get(..end)?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use devices::legacy::ConsoleOptions;

    use super::*;

    fn notice_with(console_text: &str) -> ExitNotice {
        let mut console = ConsoleOutput::new(ConsoleOptions::default()).unwrap();
        console.write_all(console_text.as_bytes()).unwrap();
        let notice = ExitNotice::new();
        notice.reads(&console);
        notice
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let notice = notice_with("hello\n[ 1.0] Kernel panic - not syncing: sysrq\r\nmore\r\n");
        notice.report(ExitReason::GuestReset);
        let Some(ExitReason::GuestPanic(words)) = notice.get() else {
            panic!("{:?}", notice.get());
        };
        assert_eq!(words, "Kernel panic - not syncing: sysrq\r\nmore");
    }

    #[test]
    fn a_plain_reset_stays_one_and_a_stop_too() {
        let notice = notice_with("reboot: Restarting system\n");
        notice.report(ExitReason::GuestReset);
        assert_eq!(notice.get(), Some(ExitReason::GuestReset));
        let notice = notice_with("Kernel panic - but somebody stopped the machine first\n");
        notice.report(ExitReason::Stopped);
        assert_eq!(notice.get(), Some(ExitReason::Stopped));
    }
}
