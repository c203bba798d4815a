//! The one place where threads of a machine are born.
//!
//! Each has a name, an unwind guard, a filter of system calls and an exit notice: a panic ends its
//! machine, with the thread's name and the message in the reason, and nothing else.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use devices::event_loop::Threads;
use devices::virtio::EventHandler;
use nix::unistd::{Pid, gettid};

use crate::exit::ExitNotice;
use crate::seccomp::{Violations, Watcher};
use crate::vm::ExitReason;

/// Bytes of a thread's name that the kernel shows.
const NAME_BYTES: usize = 15;

/// Spawns the threads of one machine.
#[derive(Clone, Debug)]
pub(crate) struct VmThreads {
    names: Arc<Names>,
    exit: ExitNotice,
    violations: Arc<Violations>,
}

/// What the machine and its threads are called.
#[derive(Debug)]
struct Names {
    machine: Mutex<String>,
    /// The threads that run, with the role that each name begins with.
    threads: Mutex<HashMap<Pid, String>>,
}

impl VmThreads {
    pub(crate) fn new(machine: &str, exit: ExitNotice) -> io::Result<Self> {
        Ok(Self {
            names: Arc::new(Names {
                machine: Mutex::new(machine.to_owned()),
                threads: Mutex::default(),
            }),
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
    pub(crate) fn machine(&self) -> String {
        lock(&self.names.machine).clone()
    }

    /// Calls the machine and its threads by another name from now on.
    pub(crate) fn rename(&self, machine: &str) {
        let threads = lock(&self.names.threads);
        machine.clone_into(&mut lock(&self.names.machine));
        for (thread, role) in threads.iter() {
            let file = format!("/proc/self/task/{thread}/comm");
            if let Err(err) = std::fs::write(file, cut(role, machine)) {
                tracing::debug!(%err, role, "a thread keeps its name");
            }
        }
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
        let name = cut(role, &self.machine());
        let exit = self.exit.clone();
        let names = Arc::clone(&self.names);
        let role = role.to_owned();
        let violations = Arc::clone(&self.violations);
        let handle = thread::Builder::new().name(name).spawn(move || {
            let me = gettid();
            lock(&names.threads).insert(me, role.clone());
            // The closure owns everything it uses, and none of it is seen again after a
            // panic: no broken invariant can be observed.
            let confined = || violations.confine(work);
            let ended = catch_unwind(AssertUnwindSafe(confined));
            lock(&names.threads).remove(&me);
            let machine = lock(&names.machine).clone();
            let label = cut(&role, &machine);
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
}

/// The name of a thread of `machine`.
fn cut(role: &str, machine: &str) -> String {
    let mut name = format!("{role}-{machine}");
    let mut end = name.len().min(NAME_BYTES);
    while !name.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    name.truncate(end);
    name
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert_eq!(cut("vcpu12", "a-rather-long-name"), "vcpu12-a-rather");
    }
}
