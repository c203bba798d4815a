//! Advances the engine's epoch, which makes guests that compute yield.
//!
//! The thread sleeps while no guest runs: an idle host wakes up for nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use wasmtime::Engine;

use crate::error::{Result, WasmError};

/// Time between two epochs: the longest a guest computes before it is looked at.
pub(crate) const TICK: Duration = Duration::from_millis(5);

/// Ticks without any guest before the thread sleeps.
const IDLE_TICKS: u32 = 20;

#[derive(Debug, Default)]
struct Shared {
    /// Guests that run right now.
    running: AtomicUsize,
    asleep: AtomicBool,
    stop: AtomicBool,
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    pub(crate) fn start(engine: &Engine) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let engine = engine.weak();
        let (running, runs) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("wasm-epoch".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let _ = running.send(());
                    let mut idle = 0;
                    while !shared.stop.load(Ordering::Acquire) {
                        std::thread::sleep(TICK);
                        let Some(engine) = engine.upgrade() else {
                            break;
                        };
                        engine.increment_epoch();
                        idle = match shared.running.load(Ordering::Acquire) {
                            0 => idle + 1,
                            _ => 0,
                        };
                        if idle >= IDLE_TICKS {
                            idle = 0;
                            shared.sleep();
                        }
                    }
                }
            })
            .map_err(WasmError::io("starting the epoch thread"))?;
        // From here on it is seen under its name.
        let _ = runs.recv();
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Says that a guest runs, until the guard is dropped.
    pub(crate) fn guest_runs(&self) -> Running<'_> {
        self.shared.running.fetch_add(1, Ordering::AcqRel);
        if self.shared.asleep.load(Ordering::Acquire) {
            self.wake();
        }
        Running(&self.shared)
    }

    fn wake(&self) {
        self.shared.asleep.store(false, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Shared {
    fn sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        // A guest that began before it could see the flag is seen here.
        while self.asleep.load(Ordering::SeqCst)
            && self.running.load(Ordering::SeqCst) == 0
            && !self.stop.load(Ordering::Acquire)
        {
            std::thread::park();
        }
        self.asleep.store(false, Ordering::Release);
    }
}

/// See [`Ticker::guest_runs`].
#[derive(Debug)]
pub(crate) struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // Joining from itself would never end: the last engine may be dropped anywhere.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}
