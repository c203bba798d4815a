use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::event_loop::{EventLoop, Threads};
use crate::virtio::Runner;

/// A real event loop and real workers, which record failures instead of ending a VM.
#[derive(Debug)]
pub struct TestRunner {
    event_loop: EventLoop,
    threads: Arc<TestThreads>,
}

#[derive(Debug, Default)]
struct TestThreads {
    failures: Mutex<Vec<String>>,
}

impl Threads for Arc<TestThreads> {
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let this = Arc::clone(self);
        let label = name.to_owned();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                this.failures
                    .lock()
                    .unwrap()
                    .push(format!("thread {label} panicked"));
            }
        })
    }

    fn failed(&self, what: String) {
        self.failures.lock().unwrap().push(what);
    }
}

impl TestRunner {
    /// Starts the loop.
    #[must_use]
    pub fn start() -> Self {
        let threads = Arc::new(TestThreads::default());
        let event_loop = EventLoop::start("test-loop", Arc::new(Arc::clone(&threads))).unwrap();
        Self {
            event_loop,
            threads,
        }
    }

    /// For [`crate::virtio::Activation`].
    #[must_use]
    pub fn runner(&self) -> Arc<dyn Runner> {
        self.event_loop.runner()
    }

    /// Panics of handlers and workers, and handlers that did not start.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        self.threads.failures.lock().unwrap().clone()
    }

    /// Ends and joins everything.
    pub fn shutdown(&mut self) {
        self.event_loop.shutdown();
    }
}
