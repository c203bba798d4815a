//! The one place where threads of a machine are born.
//!
//! Each has a name, an unwind guard, a filter of system calls and an exit notice: a panic ends its
//! machine, with the thread's name and the message in the reason, and nothing else.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use devices::event_loop::Threads;
use devices::virtio::EventHandler;

use crate::exit::ExitNotice;
use crate::seccomp::{Violations, Watcher};
use crate::vm::ExitReason;

/// Bytes of a thread's name that the kernel shows.
const NAME_BYTES: usize = 15;

/// Spawns the threads of one machine.
#[derive(Clone, Debug)]
pub(crate) struct VmThreads {
    machine: String,
    exit: ExitNotice,
    violations: Arc<Violations>,
}

impl VmThreads {
    pub(crate) fn new(machine: &str, exit: ExitNotice) -> io::Result<Self> {
        Ok(Self {
            machine: machine.to_owned(),
            exit,
            violations: Violations::new()?,
        })
    }

    /// Ends the machine when one of its threads makes a forbidden system call.
    pub(crate) fn watcher(&self) -> Box<dyn EventHandler> {
        Box::new(Watcher {
            violations: Arc::clone(&self.violations),
            exit: self.exit.clone(),
        })
    }

    /// Name of the machine.
    pub(crate) fn machine(&self) -> &str {
        &self.machine
    }

    /// Through which the machine's end is told.
    pub(crate) fn exit(&self) -> &ExitNotice {
        &self.exit
    }

    /// Starts `work` on a thread named `role-machine`, cut to what the kernel shows.
    pub(crate) fn start(
        &self,
        role: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Thread> {
        let name = self.name(role);
        let exit = self.exit.clone();
        let label = name.clone();
        let machine = self.machine.clone();
        let violations = Arc::clone(&self.violations);
        let handle = thread::Builder::new().name(name).spawn(move || {
            // The closure owns everything it uses, and none of it is seen again after a
            // panic: no broken invariant can be observed.
            let confined = || violations.confine(work);
            let ended = catch_unwind(AssertUnwindSafe(confined));
            if let Ok(Err(err)) = &ended {
                exit.report(ExitReason::Device(format!("cannot confine {label}: {err}")));
            }
            if let Err(panic) = ended {
                let message = panic_message(&*panic);
                tracing::error!(pod = machine, thread = label, message, "thread panicked");
                exit.report(ExitReason::Panic {
                    thread: label,
                    message,
                });
            }
        })?;
        Ok(Thread {
            handle: Some(handle),
        })
    }

    fn name(&self, role: &str) -> String {
        let mut name = format!("{role}-{}", self.machine);
        let mut end = name.len().min(NAME_BYTES);
        while !name.is_char_boundary(end) {
            end = end.saturating_sub(1);
        }
        name.truncate(end);
        name
    }
}

impl Threads for VmThreads {
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let mut thread = self.start(name, work)?;
        thread
            .handle
            .take()
            .ok_or_else(|| io::Error::other("the thread was joined already"))
    }

    fn failed(&self, what: String) {
        self.exit.report(ExitReason::Device(what));
    }
}

/// A thread that is joined when dropped. Whoever owns it must have told it to end.
#[derive(Debug)]
pub(crate) struct Thread {
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    pub(crate) fn handle(&self) -> Option<&JoinHandle<()>> {
        self.handle.as_ref()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take()
            && handle.thread().id() != thread::current().id()
        {
            // Panics were reported by the guard.
            let _ = handle.join();
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_the_exit_reason() {
        let exit = ExitNotice::new();
        let threads = VmThreads::new("pod", exit.clone()).unwrap();
        drop(
            threads
                .start("dev", || panic!("as the test wants"))
                .unwrap(),
        );
        let reason = exit.get().unwrap();
        assert_eq!(
            reason,
            ExitReason::Panic {
                thread: "dev-pod".into(),
                message: "as the test wants".into()
            }
        );
    }

    #[test]
    fn the_first_reason_stays() {
        let exit = ExitNotice::new();
        exit.report(ExitReason::GuestReset);
        exit.report(ExitReason::Stopped);
        assert_eq!(exit.get(), Some(ExitReason::GuestReset));
    }

    #[test]
    fn names_are_cut_to_what_the_kernel_shows() {
        let threads = VmThreads::new("a-rather-long-name", ExitNotice::new()).unwrap();
        assert_eq!(threads.name("vcpu12"), "vcpu12-a-rather");
    }
}
