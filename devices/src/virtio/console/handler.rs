//! The two queues and the stream on the VM's event loop (virtio 1.2, 5.3.6).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::handle::{Shared, State};
use super::port::Turn;
use crate::virtio::serve::{Answer, ServeError, serve};
use crate::virtio::{ActiveQueue, EventHandler, GuestMemory, Interest, Interrupt, Loop, Ready};

/// Chains served per queue before other handlers get their turn.
const BUDGET: usize = 16;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const WAKE: u64 = 2;
const STREAM: u64 = 3;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// What one activation runs on the loop.
pub(super) struct Handler {
    shared: Arc<Shared>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    wake: EventFd,
    /// The stream as it is watched now. Unwatched while nothing is wanted of it, so that a
    /// hang-up cannot wake the loop for nothing.
    watched: Option<(RawFd, Interest)>,
}

impl Handler {
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        [receive, transmit]: [ActiveQueue; 2],
    ) -> io::Result<Self> {
        Ok(Self {
            wake: shared.wake_event()?,
            shared,
            memory,
            interrupt,
            receive,
            transmit,
            watched: None,
        })
    }

    /// Puts the stream that a handle wants in place.
    fn change_stream(&mut self, lp: &mut dyn Loop, state: &mut State) {
        if let Some(change) = state.change.take() {
            // Before the fd is closed, and its number perhaps used again.
            self.unwatch(lp);
            state.stream = change;
        }
    }

    fn pump(&mut self, lp: &mut dyn Loop, hangup: bool) -> Result<(), ServeError> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        self.change_stream(lp, &mut state);
        let mut turn = Turn::default();
        serve(
            &self.memory,
            &mut self.transmit,
            &*self.interrupt,
            BUDGET,
            |memory, chain| turn.transmit(&mut state, memory, chain),
        )?;
        if turn.more_output {
            wake(&self.transmit.notify)?;
        }
        if let Some(attached) = &mut state.stream {
            serve(
                &self.memory,
                &mut self.receive,
                &*self.interrupt,
                BUDGET,
                |memory, chain| {
                    if attached.input {
                        turn.receive(attached, memory, chain)
                    } else {
                        Ok(Answer::Later)
                    }
                },
            )?;
            turn.closed |= hangup && !attached.input;
        }
        if turn.closed {
            self.unwatch(lp);
            state.stream = None;
            // What the stream held up.
            wake(&self.transmit.notify)?;
            return Ok(());
        }
        let wanted = state.stream.as_ref().map(|attached| {
            let interest = Interest {
                readable: turn.wants_input,
                writable: turn.blocked,
            };
            (attached.stream.as_raw_fd(), interest)
        });
        self.watch(lp, wanted).map_err(|source| ServeError::Io {
            what: "cannot watch the attached stream",
            source,
        })
    }

    fn watch(&mut self, lp: &mut dyn Loop, wanted: Option<(RawFd, Interest)>) -> io::Result<()> {
        let wanted = wanted.filter(|(_, interest)| *interest != Interest::default());
        if self.watched == wanted {
            return Ok(());
        }
        match (self.watched, wanted) {
            (Some((old, _)), Some((fd, interest))) if old == fd => {
                lp.rewatch(fd, STREAM, interest)?;
            }
            (_, Some((fd, interest))) => {
                self.unwatch(lp);
                lp.watch(fd, STREAM, interest)?;
            }
            (_, None) => self.unwatch(lp),
        }
        self.watched = wanted;
        Ok(())
    }

    fn unwatch(&mut self, lp: &mut dyn Loop) {
        if let Some((fd, _)) = self.watched.take() {
            lp.forget(fd);
        }
    }
}

impl EventHandler for Handler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(self.receive.notify.as_raw_fd(), RECEIVE, READ)?;
        lp.watch(self.transmit.notify.as_raw_fd(), TRANSMIT, READ)?;
        lp.watch(self.wake.as_raw_fd(), WAKE, READ)?;
        // Streams attached and buffers queued already.
        self.wake.write(1)
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready) {
        match token {
            RECEIVE => drop(self.receive.notify.read()),
            TRANSMIT => drop(self.transmit.notify.read()),
            WAKE => drop(self.wake.read()),
            _ => {}
        }
        let hangup = token == STREAM && ready.hangup;
        if let Err(err) = self.pump(lp, hangup) {
            self.unwatch(lp);
            for fd in [
                self.receive.notify.as_raw_fd(),
                self.transmit.notify.as_raw_fd(),
                self.wake.as_raw_fd(),
            ] {
                lp.forget(fd);
            }
            self.interrupt.needs_reset(&format!("console: {err}"));
        }
    }
}

fn wake(notify: &EventFd) -> Result<(), ServeError> {
    notify.write(1).map_err(|source| ServeError::Io {
        what: "cannot wake the event loop",
        source,
    })
}
