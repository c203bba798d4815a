//! The host's side of the device: [`VsockHandle`].

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use tokio::sync::{mpsc, oneshot};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::uds::Listener;

/// Streams that may wait in one listener before further guests are refused.
const BACKLOG: usize = 64;
/// Connects that may wait for the driver.
const MAX_QUEUED: usize = 1024;

/// Opens and accepts streams between host and guest; cheap to clone.
///
/// Works before the guest's driver is up: connects wait for it. Once the device is gone,
/// connects fail and listeners end.
#[derive(Clone, Debug)]
pub struct VsockHandle {
    host: Arc<Host>,
}

impl VsockHandle {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }

    /// Opens a stream to `guest_port`.
    ///
    /// The receiver resolves once the guest has answered: a nonblocking stream, or
    /// `ConnectionRefused` when nothing listens there, `TimedOut` when the guest does not
    /// answer within 30 s of its driver being up, `NotConnected` when the device is gone,
    /// `ConnectionReset` when it was reset meanwhile. Dropping the receiver cancels the
    /// connect, on the guest's side too.
    #[must_use]
    pub fn connect(&self, guest_port: u32) -> oneshot::Receiver<io::Result<UnixStream>> {
        let (reply, result) = oneshot::channel();
        let waiter = Waiter::new(reply);
        let mut state = self.host.lock();
        if state.closed {
            waiter.resolve(Err(gone()));
        } else if state.connects.len() >= MAX_QUEUED {
            waiter.resolve(Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("{MAX_QUEUED} connects already wait for the guest's vsock driver"),
            )));
        } else {
            state.connects.push_back(Connect { guest_port, waiter });
            drop(state);
            self.host.wake();
        }
        result
    }

    /// Accepts the streams that the guest opens to `host_port`; they are nonblocking.
    /// Dropping the receiver frees the port: the guest is refused from then on. The
    /// receiver ends when the device is gone.
    ///
    /// # Errors
    /// `AddrInUse` when the port has a listener; `NotConnected` when the device is gone.
    pub fn listen(&self, host_port: u32) -> io::Result<mpsc::Receiver<UnixStream>> {
        let mut state = self.host.lock();
        if state.closed {
            return Err(gone());
        }
        if state
            .listeners
            .get(&host_port)
            .is_some_and(|listener| !listener.is_closed())
        {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("vsock host port {host_port} already has a listener"),
            ));
        }
        let (listener, streams) = mpsc::channel(BACKLOG);
        state.listeners.insert(host_port, listener);
        if state.holds.remove(&host_port).is_some() {
            drop(state);
            self.host.wake();
        }
        Ok(streams)
    }

    /// From now on connects of the guest to `host_port` are neither accepted nor refused
    /// but held, until somebody calls [`VsockHandle::listen`] for the port: its listener
    /// then gets them in order. At most 16 are held at a time, of all ports together; more
    /// are refused. Held connects are part of a snapshot, and so a restored device holds
    /// them too.
    ///
    /// The receiver resolves once there is one. Dropping it changes nothing.
    ///
    /// # Errors
    /// `AddrInUse` when the port has a listener, or somebody waits for a connect to it;
    /// `NotConnected` when the device is gone.
    pub fn hold(&self, host_port: u32) -> io::Result<oneshot::Receiver<()>> {
        let mut state = self.host.lock();
        if state.closed {
            return Err(gone());
        }
        let listened = state
            .listeners
            .get(&host_port)
            .is_some_and(|listener| !listener.is_closed());
        let awaited = state
            .holds
            .get(&host_port)
            .is_some_and(|told| told.as_ref().is_some_and(|told| !told.is_closed()));
        if listened || awaited {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("vsock host port {host_port} is in use"),
            ));
        }
        let (told, receiver) = oneshot::channel();
        state.holds.insert(host_port, Some(told));
        drop(state);
        // There may be one from before a snapshot.
        self.host.wake();
        Ok(receiver)
    }

    /// Gives a device that was made without [`super::VsockConfig::uds_path`] its socket.
    ///
    /// # Errors
    /// As bind(2), with `AddrInUse` when the file exists; `AlreadyExists` when the device has
    /// a socket; `NotConnected` when the device is gone.
    pub fn bind(&self, path: &Path) -> io::Result<()> {
        self.host.bind(path)?;
        self.host.wake();
        Ok(())
    }

    /// Drops every connection and tells the driver to do the same
    /// (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, virtio 1.2, 5.10.6.7): for a guest that was
    /// cloned or moved, whose connections lead nowhere. Listeners stay on both sides, and
    /// connects that are not yet on their way to the guest follow after the event.
    pub fn reset_transport(&self) {
        self.host.lock().transport_reset = true;
        self.host.wake();
    }
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the VM's socket device is gone",
    )
}

/// What the handles and the device share.
pub struct Host {
    state: Mutex<State>,
    wake: EventFd,
}

#[derive(Default)]
struct State {
    connects: VecDeque<Connect>,
    cancelled: Vec<u64>,
    /// Removed with the last who uses it.
    socket: Option<Arc<Listener>>,
    listeners: HashMap<u32, mpsc::Sender<UnixStream>>,
    /// Ports whose connects are held, and who waits for the first one.
    holds: HashMap<u32, Option<oneshot::Sender<()>>>,
    transport_reset: bool,
    closed: bool,
}

/// A connect on its way to the muxer.
#[derive(Debug)]
pub struct Connect {
    /// Where to.
    pub guest_port: u32,
    /// Who asked.
    pub waiter: Waiter,
}

/// What happened to a stream offered to the listener of its port.
#[derive(Debug)]
pub enum Offer {
    /// It is in the listener's queue.
    Taken,
    /// The listener's queue is full.
    Refused,
    /// Nobody listens there; the stream was not needed.
    NoListener,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

impl Host {
    /// Nothing asked for yet.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the handler look at its requests.
    pub fn wake(&self) {
        // Fails only when the counter is full: the handler has a wake-up to come then.
        let _ = self.wake.write(1);
    }

    /// A handle of the handler's own on the wake-up event.
    pub fn wake_event(&self) -> io::Result<EventFd> {
        self.wake.try_clone()
    }

    /// Binds the device's socket.
    ///
    /// # Errors
    /// See [`VsockHandle::bind`].
    pub fn bind(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.closed {
            return Err(gone());
        }
        if let Some(socket) = &state.socket {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("the vsock device listens at {}", socket.path().display()),
            ));
        }
        state.socket = Some(Arc::new(Listener::bind(path)?));
        Ok(())
    }

    /// The device's socket, if it has one.
    pub fn socket(&self) -> Option<Arc<Listener>> {
        self.lock().socket.clone()
    }

    /// The next connect to start.
    pub fn next_connect(&self) -> Option<Connect> {
        self.lock().connects.pop_front()
    }

    /// Connections whose waiter went away.
    pub fn take_cancelled(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().cancelled)
    }

    /// Whether a transport reset was asked for since the last call.
    pub fn take_transport_reset(&self) -> bool {
        std::mem::take(&mut self.lock().transport_reset)
    }

    /// Whether connects to `port` are to be held.
    pub fn holds(&self, port: u32) -> bool {
        self.lock().holds.contains_key(&port)
    }

    /// Holds connects to these ports, as before a snapshot, unless somebody listens.
    pub fn keep_holding(&self, ports: impl Iterator<Item = u32>) {
        let state = &mut *self.lock();
        for port in ports {
            let listener = state.listeners.get(&port);
            if listener.is_none_or(mpsc::Sender::is_closed) {
                state.holds.entry(port).or_default();
            }
        }
    }

    /// A connect to `port` is held.
    pub fn tell_held(&self, port: u32) {
        let told = self.lock().holds.get_mut(&port).and_then(Option::take);
        if let Some(told) = told {
            // Who asked may have gone.
            let _ = told.send(());
        }
    }

    /// Offers the host half of a new pair to whoever listens on `port`; `make` is called
    /// only if somebody does.
    pub fn offer(
        &self,
        port: u32,
        make: impl FnOnce() -> io::Result<UnixStream>,
    ) -> io::Result<Offer> {
        let mut state = self.lock();
        let Some(listener) = state.listeners.get(&port) else {
            return Ok(Offer::NoListener);
        };
        if listener.is_closed() {
            state.listeners.remove(&port);
            return Ok(Offer::NoListener);
        }
        match listener.try_send(make()?) {
            Ok(()) => Ok(Offer::Taken),
            Err(_) => Ok(Offer::Refused),
        }
    }

    /// The device is gone: fails what waits, ends the listeners.
    pub fn close(&self) {
        let state = {
            let mut state = self.lock();
            let old = std::mem::take(&mut *state);
            state.closed = true;
            old
        };
        // Outside the lock: this wakes strangers.
        drop(state);
    }
}

/// The receiving end of a connect, answered exactly once.
#[derive(Debug)]
pub struct Waiter {
    reply: Option<oneshot::Sender<io::Result<UnixStream>>>,
}

impl Waiter {
    /// Answers through `reply`.
    pub fn new(reply: oneshot::Sender<io::Result<UnixStream>>) -> Self {
        Self { reply: Some(reply) }
    }

    /// Answers; false if nobody waits any more.
    pub fn resolve(mut self, result: io::Result<UnixStream>) -> bool {
        self.reply
            .take()
            .is_some_and(|reply| reply.send(result).is_ok())
    }

    /// Whether the caller has lost interest. Otherwise `id` is reported by
    /// [`Host::take_cancelled`] as soon as it does.
    pub fn cancelled_or_watch(&mut self, host: &Arc<Host>, id: u64) -> bool {
        let Some(reply) = &mut self.reply else {
            return true;
        };
        let waker = Waker::from(Arc::new(Cancel {
            host: Arc::clone(host),
            id,
        }));
        matches!(
            reply.poll_closed(&mut Context::from_waker(&waker)),
            Poll::Ready(())
        )
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            // The caller may have gone first.
            let _ = reply.send(Err(gone()));
        }
    }
}

/// Woken by the drop of a connect's receiver, on whatever thread that happens.
struct Cancel {
    host: Arc<Host>,
    id: u64,
}

impl Wake for Cancel {
    fn wake(self: Arc<Self>) {
        self.host.lock().cancelled.push(self.id);
        self.host.wake();
    }
}
