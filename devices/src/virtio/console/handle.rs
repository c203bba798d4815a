//! The host's side of the console, from any thread.

use std::fmt;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::config::ConfigChange;

/// Controls one console; clones share it. Survives resets of the device.
#[derive(Clone, Debug)]
pub struct ConsoleHandle {
    pub(super) shared: Arc<Shared>,
}

impl ConsoleHandle {
    /// Attaches `stream` to the port: it gets what the guest writes from now on, and what
    /// is written to it becomes the guest's input. A stream attached before is closed.
    /// When the other end closes, the console goes on without.
    ///
    /// An attached stream that does not read stops the guest's console output.
    ///
    /// # Errors
    /// When the console's event loop cannot be woken.
    pub fn attach(&self, stream: UnixStream) -> io::Result<()> {
        self.shared.replace(Some(stream))
    }

    /// Closes the attached stream, if any.
    ///
    /// # Errors
    /// As [`ConsoleHandle::attach`].
    pub fn detach(&self) -> io::Result<()> {
        self.shared.replace(None)
    }

    /// Tells the guest the size of the terminal (5.3.4).
    ///
    /// # Errors
    /// When the driver cannot be interrupted.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let size = Size { columns, rows };
        if std::mem::replace(&mut self.shared.lock().size, size) == size {
            return Ok(());
        }
        self.shared.config_change.notify()
    }
}

/// Size of the terminal in characters; zero where unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: u16,
    pub(super) rows: u16,
}

/// What the handle, the device (config space) and its handler (queues) share.
pub(super) struct Shared {
    state: Mutex<State>,
    wake: EventFd,
    pub(super) config_change: ConfigChange,
}

pub(super) struct State {
    pub(super) size: Size,
    /// Where everything the guest writes goes.
    pub(super) log: Option<Box<dyn Write + Send>>,
    /// Bytes of the first chain in the transmit queue that the host has taken already.
    pub(super) sent: usize,
    /// What is attached. Only the handler on the loop replaces it: it watches the fd.
    pub(super) stream: Option<Attached>,
    /// What a handle wants attached instead, if it wants a change at all.
    pub(super) change: Option<Option<Attached>>,
}

/// A stream on the port.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) stream: UnixStream,
    /// The other end may still send.
    pub(super) input: bool,
}

impl Shared {
    pub(super) fn new(log: Option<Box<dyn Write + Send>>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                size: Size::default(),
                log,
                sent: 0,
                stream: None,
                change: None,
            }),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            config_change: ConfigChange::default(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake_event(&self) -> io::Result<EventFd> {
        self.wake.try_clone()
    }

    fn replace(&self, stream: Option<UnixStream>) -> io::Result<()> {
        let attached = stream.map(|stream| Attached {
            stream,
            input: true,
        });
        self.lock().change = Some(attached);
        match self.wake.write(1) {
            // A full counter wakes the handler just as well.
            Err(err) if err.kind() != io::ErrorKind::WouldBlock => Err(err),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("size", &self.lock().size)
            .finish_non_exhaustive()
    }
}
