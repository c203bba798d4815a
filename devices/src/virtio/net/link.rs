//! What the device is connected to, what its driver has set, and the handle on both.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::TapDevice;
use super::config::GUEST_OFFLOADS;
use crate::virtio::config::ConfigChange;

/// A tap cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is one.
    #[error("the network slot is in use: detach its tap first")]
    Occupied,
    /// The tap does not take what the driver has negotiated.
    #[error("tap {tap}: {what}: {source}")]
    Tap {
        /// Name of the interface.
        tap: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The driver or the device could not be told. The tap is attached.
    #[error("cannot tell the guest about the tap: {0}")]
    Notify(#[source] io::Error),
}

/// A tap is not (completely) detached.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Nothing is attached.
    #[error("the network slot is empty")]
    Empty,
    /// The VM's event loop is stuck; the tap is closed once it goes on.
    #[error("the VM did not let go of the tap in time")]
    Deadline,
    /// The driver or the device could not be told.
    #[error("cannot tell the guest about the tap: {0}")]
    Notify(#[source] io::Error),
}

/// Counts since the device was made; bytes without the virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that did not fit the guest's buffers.
    pub rx_dropped: u64,
    /// How often the limit towards the guest held frames back.
    pub rx_limited: u64,
    /// Frames taken from the guest and sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that were malformed, refused by the tap, or sent while the link was down.
    pub tx_dropped: u64,
    /// How often the limit from the guest held frames back.
    pub tx_limited: u64,
}

/// One direction's counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    limited: AtomicU64,
}

impl Counters {
    pub(super) fn passed(&self, frame_bytes: usize) {
        let bytes = u64::try_from(frame_bytes).unwrap_or(0);
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn limited(&self) {
        self.limited.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the driver may change while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    pub(super) mac: [u8; 6],
    /// Pairs of queues in use.
    pub(super) pairs: u16,
    /// `VIRTIO_NET_F_GUEST_*` in force.
    pub(super) offloads: u64,
    /// Receive mode bits, by command number (5.1.6.5.1). A tap's port gets the frames that
    /// its bridge or redirect sends it; the mode is kept for snapshots.
    pub(super) rx_mode: u8,
    /// Up as far as the host's administrator is concerned.
    pub(super) up: bool,
    /// The driver was asked to announce itself and has not yet said that it does.
    pub(super) announce: bool,
}

impl Settings {
    pub(super) fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            pairs: 1,
            offloads: 0,
            rx_mode: 0,
            up: true,
            announce: false,
        }
    }

    /// Back to what a driver finds after a reset, with the features it negotiates.
    pub(super) fn start(&mut self, mac: [u8; 6], features: u64) {
        *self = Self {
            offloads: features & GUEST_OFFLOADS,
            up: self.up,
            announce: self.announce,
            ..Self::new(mac)
        };
    }

    fn apply(&self, tap: &TapDevice) -> Result<(), AttachError> {
        let failed = |what| {
            move |source| AttachError::Tap {
                tap: tap.name().to_owned(),
                what,
                source,
            }
        };
        tap.set_offloads(self.offloads)
            .map_err(failed("cannot set offloads"))?;
        tap.enable(self.pairs.into())
            .map_err(failed("cannot choose queues"))
    }
}

/// Shared by the device, its handler and its handles.
#[derive(Debug)]
pub(super) struct Link {
    state: Mutex<State>,
    applied: Condvar,
    /// Tells the handler to look at the state.
    wake: EventFd,
    pub(super) change: ConfigChange,
    pub(super) rx: Counters,
    pub(super) tx: Counters,
}

#[derive(Debug)]
struct State {
    tap: Option<Arc<TapDevice>>,
    settings: Settings,
    /// Counts changes of the tap and the link's state.
    generation: u64,
    /// The last one that the handler has taken over.
    seen: u64,
    /// There is a handler.
    running: bool,
}

/// What a handler serves.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// The tap, if frames may pass.
    pub(super) tap: Option<Arc<TapDevice>>,
    pub(super) generation: u64,
    pub(super) offloads: u64,
    pub(super) pairs: u16,
}

impl Link {
    pub(super) fn new(settings: Settings) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                tap: None,
                settings,
                generation: 0,
                seen: 0,
                running: false,
            }),
            applied: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            change: ConfigChange::default(),
            rx: Counters::default(),
            tx: Counters::default(),
        })
    }

    pub(super) fn settings(&self) -> Settings {
        self.lock().settings.clone()
    }

    /// The status field (5.1.4).
    pub(super) fn status(&self) -> u16 {
        let state = self.lock();
        let up = state.tap.is_some() && state.settings.up;
        let mut status = 0;
        if up {
            status |= VIRTIO_NET_S_LINK_UP;
        }
        if up && state.settings.announce {
            status |= VIRTIO_NET_S_ANNOUNCE;
        }
        u16::try_from(status).unwrap_or(0)
    }

    /// Changes what the driver has set; a tap that refuses leaves everything as it was.
    pub(super) fn set(&self, change: impl FnOnce(&mut Settings)) -> Result<(), AttachError> {
        let mut state = self.lock();
        let mut settings = state.settings.clone();
        change(&mut settings);
        if let Some(tap) = &state.tap {
            settings.apply(tap)?;
        }
        state.settings = settings;
        state.generation = state.generation.saturating_add(1);
        Ok(())
    }

    /// A handler starts; its end of the wake-up event.
    pub(super) fn enter(&self) -> io::Result<EventFd> {
        let wake = self.wake.try_clone()?;
        self.lock().running = true;
        Ok(wake)
    }

    /// The handler is gone, and with it what it held.
    pub(super) fn leave(&self) {
        self.lock().running = false;
        self.applied.notify_all();
    }

    /// The device is gone: closes the tap.
    pub(super) fn close(&self) {
        self.lock().tap = None;
    }

    /// The connection if it is not the one of `generation`.
    pub(super) fn newer(&self, generation: Option<u64>) -> Option<Connection> {
        let state = self.lock();
        if generation == Some(state.generation) {
            return None;
        }
        let settings = &state.settings;
        Some(Connection {
            tap: state.tap.clone().filter(|_| settings.up),
            generation: state.generation,
            offloads: settings.offloads,
            pairs: settings.pairs,
        })
    }

    /// The handler has taken over `generation` and dropped what it had before.
    pub(super) fn took(&self, generation: u64) {
        self.lock().seen = generation;
        self.applied.notify_all();
    }

    /// The interface behind `generation` is gone.
    pub(super) fn lost(&self, generation: u64) -> io::Result<()> {
        let gone = {
            let mut state = self.lock();
            if state.generation != generation {
                return Ok(());
            }
            state.generation = state.generation.saturating_add(1);
            state.tap.take()
        };
        if let Some(tap) = &gone {
            tracing::warn!(tap = tap.name(), "the tap interface has gone: link down");
        }
        self.change.notify()
    }

    pub(super) fn wake(&self) -> io::Result<()> {
        match self.wake.write(1) {
            // The counter is full: nobody has looked yet, but somebody will.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    fn tell(&self) -> io::Result<()> {
        self.wake()?;
        self.change.notify()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Controls a network device from outside its VM. Clones control the same device.
#[derive(Clone, Debug)]
pub struct NetHandle {
    link: Arc<Link>,
}

impl NetHandle {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link }
    }

    /// Connects the device to a tap; the driver sees its link come up.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, tap: TapDevice) -> Result<(), AttachError> {
        {
            let mut state = self.link.lock();
            if state.tap.is_some() {
                return Err(AttachError::Occupied);
            }
            state.settings.apply(&tap)?;
            state.tap = Some(Arc::new(tap));
            state.generation = state.generation.saturating_add(1);
        }
        self.link.tell().map_err(AttachError::Notify)
    }

    /// Disconnects the device: its link goes down, and the tap is closed when this returns,
    /// at most `deadline` from now. Blocks: not for async code.
    ///
    /// # Errors
    /// See [`DetachError`].
    pub fn detach(&self, deadline: Duration) -> Result<(), DetachError> {
        let (taken, generation) = {
            let mut state = self.link.lock();
            let taken = state.tap.take().ok_or(DetachError::Empty)?;
            state.generation = state.generation.saturating_add(1);
            (taken, state.generation)
        };
        drop(taken);
        let told = self.link.tell();
        let (state, _) = self
            .link
            .applied
            .wait_timeout_while(self.link.lock(), deadline, |state| {
                state.running && state.seen < generation
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.running && state.seen < generation {
            return Err(DetachError::Deadline);
        }
        told.map_err(DetachError::Notify)
    }

    /// Sets the link up or down as with a cable; it is only up with a tap.
    ///
    /// # Errors
    /// When the driver cannot be told.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        {
            let mut state = self.link.lock();
            state.settings.up = up;
            state.generation = state.generation.saturating_add(1);
        }
        self.link.tell()
    }

    /// Asks the driver to announce itself to its network (5.1.6.5.4): after a restore, or
    /// when the tap was plugged in elsewhere.
    ///
    /// # Errors
    /// When the driver cannot be told.
    pub fn announce(&self) -> io::Result<()> {
        self.link.lock().settings.announce = true;
        self.link.tell()
    }

    /// Whether a tap is attached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.link.lock().tap.is_some()
    }

    /// The address the guest uses.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.link.lock().settings.mac
    }

    /// Counts since the device was made.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (rx, tx) = (&self.link.rx, &self.link.tx);
        NetStats {
            rx_frames: get(&rx.frames),
            rx_bytes: get(&rx.bytes),
            rx_dropped: get(&rx.dropped),
            rx_limited: get(&rx.limited),
            tx_frames: get(&tx.frames),
            tx_bytes: get(&tx.bytes),
            tx_dropped: get(&tx.dropped),
            tx_limited: get(&tx.limited),
        }
    }
}
