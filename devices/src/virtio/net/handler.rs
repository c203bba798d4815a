//! The device on the VM's event loop: all its queues, taps and the timer of its limits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::eventfd::EventFd;

use super::config::NetConfig;
use super::control::ControlQueue;
use super::limiter::Limiter;
use super::link::{Connection, Link};
use super::rx::RxQueue;
use super::tx::{Outlet, Stopped, TxQueue};
use crate::virtio::notify::QueueError;
use crate::virtio::{EventHandler, Interest, Interrupt, Loop, Ready};

const WAKE: u64 = 0;
const TIMER: u64 = 1;
const CONTROL: u64 = 2;
/// Three tokens per pair from here on: receive queue, transmit queue, tap.
const PAIRS: u64 = 3;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// A pair of queues and the tap queue between them.
#[derive(Debug)]
pub(super) struct Pair {
    rx: RxQueue,
    tx: TxQueue,
    /// The tap queue that is watched, and for what.
    watched: Option<(RawFd, Interest)>,
    /// Why each direction stopped, which decides what it waits for.
    rx_stopped: Stopped,
    tx_stopped: Stopped,
}

impl Pair {
    pub(super) fn new(rx: RxQueue, tx: TxQueue) -> Self {
        Self {
            rx,
            tx,
            watched: None,
            rx_stopped: Stopped::Idle,
            tx_stopped: Stopped::Idle,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct NetHandler {
    interrupt: Arc<dyn Interrupt>,
    config: NetConfig,
    link: Arc<Link>,
    wake: EventFd,
    /// Set when a direction is limited; only with limits.
    timer: Option<TimerFd>,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    pairs: Vec<Pair>,
    control: Option<ControlQueue>,
    connection: Option<Connection>,
    failed: bool,
}

impl NetHandler {
    pub(super) fn new(
        interrupt: Arc<dyn Interrupt>,
        config: &NetConfig,
        link: &Arc<Link>,
        pairs: Vec<Pair>,
        control: Option<ControlQueue>,
    ) -> io::Result<Self> {
        let limited = !config.rx_limit.is_none() || !config.tx_limit.is_none();
        let timer = limited
            .then(|| {
                let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
                TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)
            })
            .transpose()?;
        let now = Instant::now();
        Ok(Self {
            interrupt,
            config: config.clone(),
            wake: link.enter()?,
            link: Arc::clone(link),
            timer,
            rx_limiter: Limiter::new(config.rx_limit, now),
            tx_limiter: Limiter::new(config.tx_limit, now),
            pairs,
            control,
            connection: None,
            failed: false,
        })
    }

    fn handle(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready) -> Result<(), QueueError> {
        match token {
            // Event counters: an empty one is a stale event, and just as good.
            WAKE => {
                let _ = self.wake.read();
                self.connect(lp)?;
                self.pump_control()?;
                self.pump_all(lp)
            }
            TIMER => {
                if let Some(timer) = &self.timer {
                    let _ = timer.wait();
                }
                self.pump_all(lp)
            }
            CONTROL => {
                if let Some(control) = &self.control {
                    let _ = control.active.notify.read();
                }
                self.pump_control()?;
                if self.connect(lp)? {
                    self.pump_all(lp)?;
                }
                Ok(())
            }
            _ => {
                let Some(token) = token.checked_sub(PAIRS) else {
                    return Ok(());
                };
                let Ok(index) = usize::try_from(token / 3) else {
                    return Ok(());
                };
                self.pair_ready(lp, index, token % 3, ready)
            }
        }
    }

    fn pair_ready(
        &mut self,
        lp: &mut dyn Loop,
        index: usize,
        source: u64,
        ready: Ready,
    ) -> Result<(), QueueError> {
        let Some(pair) = self.pairs.get(index) else {
            return Ok(());
        };
        let (mut rx, mut tx) = (false, false);
        match source {
            0 => {
                let _ = pair.rx.active.notify.read();
                rx = true;
            }
            1 => {
                let _ = pair.tx.active.notify.read();
                tx = true;
            }
            _ => {
                rx = ready.readable || ready.hangup;
                tx = ready.writable || ready.hangup;
            }
        }
        if tx {
            self.pump_tx(index)?;
        }
        if rx {
            self.pump_rx(index)?;
        }
        // A tap reports neither hang-up nor error before its interface is gone.
        if let (true, Some(pair)) = (source == 2 && ready.hangup, self.pairs.get_mut(index)) {
            pair.rx_stopped = Stopped::Lost;
        }
        self.settle(lp, index)
    }

    /// Takes over a change of the link, if there is one.
    fn connect(&mut self, lp: &mut dyn Loop) -> Result<bool, QueueError> {
        let seen = self.connection.as_ref().map(|now| now.generation);
        let Some(newer) = self.link.newer(seen) else {
            return Ok(false);
        };
        let generation = newer.generation;
        for pair in &mut self.pairs {
            if let Some((fd, _)) = pair.watched.take() {
                lp.forget(fd);
            }
            pair.rx_stopped = Stopped::Idle;
            pair.tx_stopped = Stopped::Idle;
        }
        // Closes a tap that was detached.
        self.connection = Some(newer);
        self.link.took(generation);
        for index in 0..self.pairs.len() {
            self.settle(lp, index)?;
        }
        Ok(true)
    }

    fn pump_all(&mut self, lp: &mut dyn Loop) -> Result<(), QueueError> {
        for index in 0..self.pairs.len() {
            self.pump_tx(index)?;
            self.pump_rx(index)?;
            self.settle(lp, index)?;
        }
        Ok(())
    }

    fn pump_control(&mut self) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        if control.pump(&self.link, &*self.interrupt)? == Stopped::Budget {
            again(&control.active.notify)?;
        }
        Ok(())
    }

    fn pump_tx(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        let outlet = outlet(&self.link, self.connection.as_ref(), index);
        pair.tx_stopped = pair.tx.pump(
            outlet,
            &mut self.tx_limiter,
            &self.link.tx,
            &*self.interrupt,
        )?;
        Ok(())
    }

    fn pump_rx(&mut self, index: usize) -> Result<(), QueueError> {
        let (Some(pair), Some(connection)) = (self.pairs.get_mut(index), &self.connection) else {
            return Ok(());
        };
        let Some(tap) = receiver(connection, index) else {
            pair.rx_stopped = Stopped::Idle;
            return Ok(());
        };
        let longest = self.config.longest_frame(connection.offloads);
        pair.rx_stopped = pair.rx.pump(
            tap,
            longest,
            &mut self.rx_limiter,
            &self.link.rx,
            &*self.interrupt,
        )?;
        Ok(())
    }

    /// Waits for whatever lets a pair go on.
    fn settle(&mut self, lp: &mut dyn Loop, index: usize) -> Result<(), QueueError> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        let mut interest = Interest::default();
        let mut wait = None;
        let mut lost = false;
        match pair.rx_stopped {
            // Level-triggered: what is left in the tap reports itself.
            Stopped::Idle | Stopped::Budget => interest.readable = true,
            // The driver notifies when it has buffers.
            Stopped::Blocked => {}
            Stopped::Limited(left) => wait = Some(left),
            Stopped::Lost => lost = true,
        }
        match pair.tx_stopped {
            Stopped::Idle => {}
            Stopped::Budget => again(&pair.tx.active.notify)?,
            Stopped::Blocked => interest.writable = true,
            Stopped::Limited(left) => {
                wait = Some(wait.map_or(left, |wait: Duration| wait.min(left)));
            }
            Stopped::Lost => lost = true,
        }
        let fd = self
            .connection
            .as_ref()
            .filter(|_| !lost)
            .and_then(|connection| receiver(connection, index));
        let wanted = fd.map(|fd| (fd.as_raw_fd(), interest));
        watch(lp, pair, index, wanted)?;
        if let Some(wait) = wait {
            self.set_timer(wait)?;
        }
        if let (true, Some(connection)) = (lost, &self.connection) {
            let told = self.link.lost(connection.generation);
            told.and_then(|()| self.link.wake())
                .map_err(io_error("cannot tell the driver that its link is down"))?;
        }
        Ok(())
    }

    /// Wakes the handler after `wait`, or before if it is set already. Both directions of
    /// all pairs look at their limits then.
    fn set_timer(&self, wait: Duration) -> Result<(), QueueError> {
        let Some(timer) = &self.timer else {
            return Ok(());
        };
        let error = io_error("cannot set the timer of the rate limit");
        let set = match timer.get() {
            Ok(Some(Expiration::OneShot(left))) => Duration::from(left) > wait,
            Ok(_) => true,
            Err(err) => return Err(error(err.into())),
        };
        if set {
            // Zero would disarm it.
            let wait = wait.max(Duration::from_micros(50));
            let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
            timer
                .set(expiration, TimerSetTimeFlags::empty())
                .map_err(|err| error(err.into()))?;
        }
        Ok(())
    }

    fn fds(&self) -> Vec<RawFd> {
        let mut fds = vec![self.wake.as_raw_fd()];
        fds.extend(self.timer.as_ref().map(|timer| timer.as_fd().as_raw_fd()));
        fds.extend(
            self.control
                .as_ref()
                .map(|queue| queue.active.notify.as_raw_fd()),
        );
        for pair in &self.pairs {
            fds.push(pair.rx.active.notify.as_raw_fd());
            fds.push(pair.tx.active.notify.as_raw_fd());
            fds.extend(pair.watched.map(|(fd, _)| fd));
        }
        fds
    }
}

/// The tap queue that pair `index` receives from.
fn receiver(connection: &Connection, index: usize) -> Option<BorrowedFd<'_>> {
    if index >= usize::from(connection.pairs) {
        return None;
    }
    connection.tap.as_ref()?.receiver(index)
}

/// Where pair `index` sends: its own tap queue, or one that it shares.
fn outlet<'a>(link: &'a Link, connection: Option<&'a Connection>, index: usize) -> Outlet<'a> {
    let generation = connection.map(|connection| connection.generation);
    let down = Outlet::Down { link, generation };
    let Some(connection) = connection else {
        return down;
    };
    if let Some(tap) = receiver(connection, index) {
        return Outlet::Own(tap);
    }
    // A tap queue can only be watched by the pair that it belongs to.
    let shared = connection.tap.as_ref().and_then(|tap| tap.queue(index));
    shared.map_or(down, Outlet::Shared)
}

fn watch(
    lp: &mut dyn Loop,
    pair: &mut Pair,
    index: usize,
    wanted: Option<(RawFd, Interest)>,
) -> Result<(), QueueError> {
    let wanted = wanted.filter(|(_, interest)| interest.readable || interest.writable);
    if pair.watched == wanted {
        return Ok(());
    }
    let index = u64::try_from(index).unwrap_or(0);
    let token = index.saturating_mul(3).saturating_add(PAIRS + 2);
    let result = match (pair.watched, wanted) {
        (Some((old, _)), Some((fd, interest))) if old == fd => lp.rewatch(fd, token, interest),
        (old, wanted) => {
            if let Some((fd, _)) = old {
                lp.forget(fd);
            }
            wanted.map_or(Ok(()), |(fd, interest)| lp.watch(fd, token, interest))
        }
    };
    pair.watched = wanted;
    result.map_err(io_error("cannot watch the tap"))
}

/// Comes back to a queue after the others had their turn.
fn again(notify: &EventFd) -> Result<(), QueueError> {
    notify.write(1).map_err(io_error("cannot wake the queue"))
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> QueueError {
    move |source| QueueError::Io { what, source }
}

impl EventHandler for NetHandler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(self.wake.as_raw_fd(), WAKE, READ)?;
        if let Some(timer) = &self.timer {
            lp.watch(timer.as_fd().as_raw_fd(), TIMER, READ)?;
        }
        if let Some(control) = &self.control {
            lp.watch(control.active.notify.as_raw_fd(), CONTROL, READ)?;
        }
        for (pair, first) in self.pairs.iter().zip((PAIRS..).step_by(3)) {
            lp.watch(pair.rx.active.notify.as_raw_fd(), first, READ)?;
            let second = first.saturating_add(1);
            lp.watch(pair.tx.active.notify.as_raw_fd(), second, READ)?;
        }
        // Takes over the link, and what the driver has queued already.
        self.link.wake()
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready) {
        if self.failed {
            // Still lets go of taps that are detached.
            if token == WAKE {
                let _ = self.wake.read();
                let seen = self.connection.as_ref().map(|now| now.generation);
                if let Some(newer) = self.link.newer(seen) {
                    let generation = newer.generation;
                    self.connection = Some(Connection { tap: None, ..newer });
                    self.link.took(generation);
                }
            }
            return;
        }
        if let Err(err) = self.handle(lp, token, ready) {
            self.failed = true;
            let wake = self.wake.as_raw_fd();
            for fd in self.fds() {
                if fd != wake {
                    lp.forget(fd);
                }
            }
            self.interrupt.needs_reset(&format!("net: {err}"));
        }
    }
}

impl Drop for NetHandler {
    fn drop(&mut self) {
        // The tap first: a detach waits for it to be closed.
        self.connection = None;
        self.link.leave();
    }
}
