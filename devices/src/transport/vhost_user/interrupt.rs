use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// The eventfds by which the front-end hears of the device.
#[derive(Debug)]
pub(super) struct Calls {
    device: &'static str,
    rings: Vec<Mutex<Call>>,
    broken: AtomicBool,
    config_told: AtomicBool,
}

#[derive(Debug, Default)]
struct Call {
    call: Option<EventFd>,
    error: Option<EventFd>,
    /// Buffers were used while there was nobody to tell.
    missed: bool,
}

impl Calls {
    pub(super) fn new(device: &'static str, rings: usize) -> Self {
        Self {
            device,
            rings: (0..rings).map(|_| Mutex::default()).collect(),
            broken: AtomicBool::new(false),
            config_told: AtomicBool::new(false),
        }
    }

    /// Front-ends change it while the device runs, to mask and unmask the interrupt.
    pub(super) fn set_call(&self, index: u16, call: Option<EventFd>) {
        if let Some(mut ring) = self.ring(index) {
            ring.call = call;
            if ring.missed {
                ring.missed = false;
                let _ = ring.signal();
            }
        }
    }

    pub(super) fn set_error(&self, index: u16, error: Option<EventFd>) {
        if let Some(mut ring) = self.ring(index) {
            ring.error = error;
        }
    }

    /// Forgets the front-end.
    pub(super) fn clear(&self) {
        for ring in &self.rings {
            *lock(ring) = Call::default();
        }
        self.broken.store(false, Ordering::SeqCst);
    }

    /// Whether the device asked for a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    pub(super) fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    fn ring(&self, index: u16) -> Option<MutexGuard<'_, Call>> {
        self.rings.get(usize::from(index)).map(lock)
    }
}

impl Call {
    fn signal(&mut self) -> io::Result<()> {
        match &self.call {
            Some(call) => write(call),
            None => {
                self.missed = true;
                Ok(())
            }
        }
    }
}

/// A full counter is a call that nobody has taken yet.
fn write(event: &EventFd) -> io::Result<()> {
    match event.write(1) {
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

fn lock(ring: &Mutex<Call>) -> MutexGuard<'_, Call> {
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interrupt for Calls {
    fn used_queue(&self, queue: u16) -> io::Result<()> {
        self.ring(queue).map_or(Ok(()), |mut ring| ring.signal())
    }

    fn config_changed(&self) -> io::Result<()> {
        if !self.config_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                device = self.device,
                "the VMM is not told that the configuration changed"
            );
        }
        Ok(())
    }

    fn needs_reset(&self, reason: &str) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::warn!(device = self.device, reason, "device needs a reset");
            for ring in &self.rings {
                // Nobody is left to tell when this fails, too.
                let _ = lock(ring).error.as_ref().map(write);
            }
        }
    }
}
