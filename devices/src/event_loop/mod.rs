//! One thread that serves many fds: the [`Runner`] behind every in-process device.
//!
//! The `event-manager` crate does not fit the contract: a subscriber cannot report that it
//! failed to start, registrations are keyed by fd number (an event left over from a closed
//! and re-used number reaches the wrong subscriber, one without subscriber panics), and a
//! blocking call from the loop's own thread never returns. Plain epoll is as short.

mod core;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::core::Core;
use crate::virtio::{EventHandler, HandlerId, Runner, StopToken, WorkerId};

/// How a loop gets its threads: the VM's one helper, or a test's.
pub trait Threads: Send + Sync + fmt::Debug {
    /// Starts `work` on a thread named `name`, with whatever guard the owner wants.
    ///
    /// # Errors
    /// When the thread cannot be created.
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;

    /// Something failed that no caller can be told of.
    fn failed(&self, what: String);
}

/// What the loop's thread is asked to do.
enum Command {
    Add {
        id: HandlerId,
        handler: Box<dyn EventHandler>,
        /// `None` when nobody waits; the loop's own thread cannot wait for itself.
        reply: Option<Sender<io::Result<()>>>,
    },
    Remove {
        id: HandlerId,
        /// Dropped once the handler is gone.
        done: Option<Sender<()>>,
    },
    Stop,
}

/// The owner of a loop thread and its workers; dropping it ends and joins them.
#[derive(Debug)]
pub struct EventLoop {
    runner: Arc<LoopRunner>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the loop's thread, named `name`.
    ///
    /// # Errors
    /// When the kernel has no more fds or threads.
    pub fn start(name: &str, threads: Arc<dyn Threads>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let core = Core::new(wake.try_clone()?, inbox, Arc::clone(&threads))?;
        let runner = Arc::new(LoopRunner {
            commands,
            wake,
            threads,
            next_id: AtomicU64::new(1),
            thread: OnceLock::new(),
            workers: Mutex::new(Workers::default()),
        });
        let thread = runner.threads.spawn(name, Box::new(move || core.run()))?;
        // Set before anyone else can hold the runner.
        let _ = runner.thread.set(thread.thread().id());
        Ok(Self {
            runner,
            thread: Some(thread),
        })
    }

    /// The handle that devices get.
    #[must_use]
    pub fn runner(&self) -> Arc<dyn Runner> {
        Arc::clone(&self.runner) as Arc<dyn Runner>
    }

    /// Ends the workers, then the loop, dropping all handlers; joins every thread.
    pub fn shutdown(&mut self) {
        let workers = {
            let mut table = self.runner.lock_workers();
            table.closed = true;
            std::mem::take(&mut table.running)
        };
        // Signal all before joining the first: they end side by side.
        for worker in workers.values() {
            worker.signal();
        }
        for (_, worker) in workers {
            worker.join();
        }
        let _ = self.runner.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            join_unless_self(thread);
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn join_unless_self(thread: JoinHandle<()>) {
    if thread.thread().id() != std::thread::current().id() {
        // A panic was reported by the thread's own guard.
        let _ = thread.join();
    }
}

#[derive(Debug)]
struct Worker {
    stop: io::PipeWriter,
    thread: JoinHandle<()>,
}

impl Worker {
    fn signal(&self) {
        // Fails only when the worker is gone already.
        let _ = (&self.stop).write(&[1]);
    }

    fn join(self) {
        self.signal();
        join_unless_self(self.thread);
    }
}

#[derive(Debug, Default)]
struct Workers {
    running: HashMap<WorkerId, Worker>,
    closed: bool,
}

#[derive(Debug)]
struct LoopRunner {
    commands: Sender<Command>,
    wake: EventFd,
    threads: Arc<dyn Threads>,
    next_id: AtomicU64,
    thread: OnceLock<ThreadId>,
    workers: Mutex<Workers>,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { id, .. } => write!(f, "Add({})", id.0),
            Self::Remove { id, .. } => write!(f, "Remove({})", id.0),
            Self::Stop => f.write_str("Stop"),
        }
    }
}

impl LoopRunner {
    fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn on_loop_thread(&self) -> bool {
        self.thread.get() == Some(&std::thread::current().id())
    }

    fn lock_workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands
            .send(command)
            .map_err(|_| io::Error::other("the event loop has ended"))?;
        match self.wake.write(1) {
            // The counter is full: the loop has not woken yet, but it will.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Runner for LoopRunner {
    fn add(&self, handler: Box<dyn EventHandler>) -> io::Result<HandlerId> {
        if self.on_loop_thread() {
            return self.post(handler);
        }
        let id = HandlerId(self.id());
        let (reply, started) = mpsc::channel();
        self.send(Command::Add {
            id,
            handler,
            reply: Some(reply),
        })?;
        started
            .recv()
            .map_err(|_| io::Error::other("the event loop has ended"))??;
        Ok(id)
    }

    fn post(&self, handler: Box<dyn EventHandler>) -> io::Result<HandlerId> {
        let id = HandlerId(self.id());
        self.send(Command::Add {
            id,
            handler,
            reply: None,
        })?;
        Ok(id)
    }

    fn remove(&self, id: HandlerId) {
        if self.on_loop_thread() {
            let _ = self.send(Command::Remove { id, done: None });
            return;
        }
        let (done, gone) = mpsc::channel();
        if self
            .send(Command::Remove {
                id,
                done: Some(done),
            })
            .is_ok()
        {
            // Returns on the loop's drop of `done`, also when the loop ends first.
            let _ = gone.recv();
        }
    }

    fn spawn(&self, name: &str, work: Box<dyn FnOnce(StopToken) + Send>) -> io::Result<WorkerId> {
        let (stop_reader, stop) = io::pipe()?;
        let token = StopToken(OwnedFd::from(stop_reader));
        let mut workers = self.lock_workers();
        if workers.closed {
            return Err(io::Error::other("the event loop has ended"));
        }
        let thread = self.threads.spawn(name, Box::new(move || work(token)))?;
        let id = WorkerId(self.id());
        workers.running.insert(id, Worker { stop, thread });
        Ok(id)
    }

    fn join(&self, id: WorkerId) {
        let worker = self.lock_workers().running.remove(&id);
        if let Some(worker) = worker {
            worker.join();
        }
    }
}
