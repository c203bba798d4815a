//! The device on the VM's event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::host::Host;
use super::muxer::{FIRST_ID, Muxer};
use super::queues::{Progress, Queues};
use super::uds;
use crate::virtio::notify::QueueError;
use crate::virtio::{EventHandler, Interest, Loop, Ready};

const RX: u64 = 0;
const TX: u64 = 1;
const EVENT: u64 = 2;
const WAKE: u64 = 3;
const DEADLINE: u64 = 4;
const LISTENER: u64 = 5;

/// Clients accepted per event.
const ACCEPT_BUDGET: usize = 16;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// The connections of a device, which outlive an activation when the device is only
/// quiesced.
#[derive(Debug)]
pub struct Connections {
    muxer: Mutex<Muxer>,
    keep: AtomicBool,
}

impl Connections {
    /// Of a muxer that is not on a loop.
    pub fn new(muxer: Muxer) -> Self {
        Self {
            muxer: Mutex::new(muxer),
            keep: AtomicBool::new(false),
        }
    }

    /// Says whether the connections stay when their handler leaves the loop.
    pub fn keep(&self, keep: bool) {
        self.keep.store(keep, Ordering::SeqCst);
    }

    /// Only the handler uses them while there is one.
    pub fn lock(&self) -> MutexGuard<'_, Muxer> {
        self.muxer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one activation runs on the loop.
#[derive(Debug)]
pub struct Handler {
    queues: Queues,
    connections: Arc<Connections>,
    host: Arc<Host>,
    /// Requests of handles, and this handler's own "go on".
    wake: EventFd,
    listener: Option<UnixListener>,
    /// The driver broke the device; nothing is served until it resets it.
    failed: bool,
}

impl Handler {
    pub fn new(queues: Queues, connections: Arc<Connections>, host: Arc<Host>) -> io::Result<Self> {
        Ok(Self {
            queues,
            connections,
            wake: host.wake_event()?,
            host,
            listener: None,
            failed: false,
        })
    }

    /// Serves the device's socket, once it has one.
    fn listen(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        if self.listener.is_none()
            && let Some(socket) = self.host.socket()
        {
            let listener = socket.listener()?;
            lp.watch(listener.as_raw_fd(), LISTENER, READ)?;
            self.listener = Some(listener);
        }
        Ok(())
    }

    fn accept(&self, lp: &mut dyn Loop, muxer: &mut Muxer) {
        let Some(listener) = &self.listener else {
            return;
        };
        for _ in 0..ACCEPT_BUDGET {
            match uds::accept(listener) {
                Ok(stream) => muxer.add_client(lp, stream),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(err) if err.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(err) => {
                    // Out of fds: stop listening rather than spin on the backlog.
                    tracing::warn!(%err, "the vsock socket accepts no more clients");
                    lp.forget(listener.as_raw_fd());
                    return;
                }
            }
        }
    }

    /// Moves packets until the queues are idle or the budget is spent.
    fn pump(&mut self, lp: &mut dyn Loop, muxer: &mut Muxer) -> Result<(), QueueError> {
        // First, so that requests for connections follow the event.
        self.queues.pump_event(muxer)?;
        let tx = self.queues.pump_tx(lp, muxer)?;
        let rx = self.queues.pump_rx(lp, muxer)?;
        let unblocked = tx == Progress::Blocked && !muxer.is_congested();
        if tx == Progress::More || rx == Progress::More || unblocked {
            self.host.wake();
        }
        Ok(())
    }

    fn fail(&mut self, lp: &mut dyn Loop, muxer: &mut Muxer, err: &QueueError) {
        self.failed = true;
        muxer.drop_connections(lp);
        for fd in [
            self.queues.rx.notify.as_raw_fd(),
            self.queues.tx.notify.as_raw_fd(),
            self.wake.as_raw_fd(),
            muxer.deadlines().fd(),
        ] {
            lp.forget(fd);
        }
        if let Some(event) = &self.queues.event {
            lp.forget(event.notify.as_raw_fd());
        }
        if let Some(listener) = &self.listener {
            lp.forget(listener.as_raw_fd());
        }
        self.queues.interrupt.needs_reset(&format!("vsock: {err}"));
    }
}

impl EventHandler for Handler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(self.queues.rx.notify.as_raw_fd(), RX, READ)?;
        lp.watch(self.queues.tx.notify.as_raw_fd(), TX, READ)?;
        if let Some(event) = &self.queues.event {
            lp.watch(event.notify.as_raw_fd(), EVENT, READ)?;
        }
        lp.watch(self.wake.as_raw_fd(), WAKE, READ)?;
        {
            let mut muxer = self.connections.lock();
            muxer.start(lp);
            lp.watch(muxer.deadlines().fd(), DEADLINE, READ)?;
        }
        self.listen(lp)?;
        // Requests made before the driver was up, and buffers it has queued already.
        self.host.wake();
        Ok(())
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready) {
        if self.failed {
            return;
        }
        let connections = Arc::clone(&self.connections);
        let muxer = &mut *connections.lock();
        // Event counters: an empty one (EAGAIN) is a stale event, and just as good.
        match token {
            RX => drop(self.queues.rx.notify.read()),
            TX => drop(self.queues.tx.notify.read()),
            EVENT => {
                let _ = self.queues.event.as_ref().map(|event| event.notify.read());
            }
            WAKE => {
                let _ = self.wake.read();
                if let Err(err) = self.listen(lp) {
                    tracing::warn!(%err, "the vsock socket is not served");
                }
                muxer.serve_host(lp);
            }
            DEADLINE => muxer.expire(lp),
            LISTENER => self.accept(lp, muxer),
            id if id >= FIRST_ID => muxer.ready(lp, id, ready),
            _ => {}
        }
        if let Err(err) = self.pump(lp, muxer) {
            self.fail(lp, muxer, &err);
            return;
        }
        if let Err(err) = muxer.deadlines().arm() {
            self.queues
                .interrupt
                .needs_reset(&format!("vsock: cannot set the deadline timer: {err}"));
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let mut muxer = self.connections.lock();
        if self.connections.keep.load(Ordering::SeqCst) {
            muxer.pause();
        } else {
            muxer.close();
        }
    }
}
