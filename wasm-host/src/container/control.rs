//! Holding, throttling and ending guests.
//!
//! A guest is a future. Whenever it is polled it first passes a gate, which is closed while
//! its container is paused or has used up its quota, and which ends it when a signal says so.
//! A guest that computes yields with each epoch, so it comes by every few milliseconds; one
//! that waits in a host call is woken.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::Sleep;

use super::Stats;
use crate::config::{CpuQuota, Limits};
use crate::ticker::{TICK, Ticker};

/// Signals whose default action is none, in Linux: CHLD, URG, WINCH.
const IGNORED: [u32; 3] = [17, 23, 28];
/// Signals that stop: STOP, TSTP, TTIN, TTOU.
const STOPPING: [u32; 4] = [19, 20, 21, 22];
const SIGCONT: u32 = 18;
const SIGKILL: u32 = 9;
/// Signals that ask: INT, QUIT, TERM.
pub(super) const ASKING: [u32; 3] = [2, 3, 15];

/// Ticks that a guest of 1024 shares computes before the next one's turn.
const USUAL_TICKS: u64 = 2;
const MAX_TICKS: u64 = 20;

/// What all guests of a container share.
#[derive(Debug)]
struct Group {
    gate: Mutex<Gate>,
    cpu_ns: AtomicU64,
    shares: AtomicU64,
    processes: AtomicU64,
    handles: AtomicU64,
}

#[derive(Debug, Default)]
struct Gate {
    paused: bool,
    killed: bool,
    quota: Option<CpuQuota>,
    period_began: Option<Instant>,
    /// CPU time in this period, and what was too much before.
    used: Duration,
    /// Until when it was held back last.
    held_until: Option<Instant>,
    throttled: u64,
    throttled_time: Duration,
    periods: u64,
    wakers: Vec<Waker>,
}

/// Controls one guest.
#[derive(Debug)]
pub(crate) struct Control {
    group: Arc<Group>,
    /// Signals to this guest: the first deadly one, and whether one stopped it.
    own: watch::Sender<Own>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Own {
    deadly: Option<u32>,
    stopped: bool,
    asked: Option<u32>,
    /// Whether the guest ends by itself when it is asked to.
    listens: bool,
}

impl Control {
    pub(super) fn new(limits: &Limits) -> Self {
        let gate = Gate {
            quota: limits.cpu_quota,
            ..Default::default()
        };
        Self {
            group: Arc::new(Group {
                gate: Mutex::new(gate),
                cpu_ns: AtomicU64::new(0),
                shares: AtomicU64::new(limits.cpu_shares),
                processes: AtomicU64::new(0),
                handles: AtomicU64::new(0),
            }),
            own: watch::Sender::default(),
        }
    }

    /// For another guest of the container.
    pub(super) fn exec(&self) -> Self {
        Self {
            group: Arc::clone(&self.group),
            own: watch::Sender::default(),
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.group
            .gate
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let wakers = std::mem::take(&mut self.gate().wakers);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn pause(&self, paused: bool) {
        self.gate().paused = paused;
        self.wake();
    }

    pub(super) fn kill_all(&self) {
        self.gate().killed = true;
        self.wake();
    }

    pub(super) fn update(&self, limits: &Limits) {
        self.gate().quota = limits.cpu_quota;
        self.group
            .shares
            .store(limits.cpu_shares, Ordering::Release);
        self.wake();
    }

    pub(super) fn signal(&self, signal: u32) {
        if signal == 0 || IGNORED.contains(&signal) {
            return;
        }
        self.own.send_modify(|own| match signal {
            SIGCONT => own.stopped = false,
            signal if STOPPING.contains(&signal) => own.stopped = true,
            signal if own.listens && ASKING.contains(&signal) => {
                own.asked.get_or_insert(signal);
            }
            signal => {
                own.deadly.get_or_insert(signal);
            }
        });
        self.wake();
    }

    /// From now on the guest watches [`Control::asked`]: such signals do not end it.
    pub(super) fn listen(&self) {
        self.own.send_modify(|own| own.listens = true);
    }

    /// Waits for a signal that asks the guest to end.
    pub(super) async fn asked(&self) -> u32 {
        let mut own = self.own.subscribe();
        loop {
            let asked = own.borrow_and_update().asked;
            if let Some(signal) = asked {
                return signal;
            }
            if own.changed().await.is_err() {
                // The sender lives in `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ticks until the guest yields.
    pub(super) fn slice(&self) -> u64 {
        let shares = self.group.shares.load(Ordering::Acquire);
        (shares.saturating_mul(USUAL_TICKS) / 1024).clamp(1, MAX_TICKS)
    }

    /// A part of the container's handles, for one guest.
    pub(super) fn handles(&self) -> Handles {
        Handles {
            group: Arc::clone(&self.group),
            counted: 0,
            at: None,
        }
    }

    pub(super) fn stats(&self) -> Stats {
        let gate = self.gate();
        Stats {
            cpu: Duration::from_nanos(self.group.cpu_ns.load(Ordering::Acquire)),
            throttled: gate.throttled,
            throttled_time: gate.throttled_time,
            periods: gate.periods,
            handles: self.group.handles.load(Ordering::Acquire),
            processes: self.group.processes.load(Ordering::Acquire),
            ..Default::default()
        }
    }

    fn charge(&self, cpu: Duration) {
        let nanos = u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX);
        self.group.cpu_ns.fetch_add(nanos, Ordering::AcqRel);
        let mut gate = self.gate();
        if gate.quota.is_some() {
            gate.used = gate.used.saturating_add(cpu);
        }
    }

    /// What the gate says now.
    fn pass(&self, waker: &Waker) -> Pass {
        let own = *self.own.borrow();
        let mut gate = self.gate();
        if gate.killed {
            return Pass::End(SIGKILL);
        }
        if let Some(signal) = own.deadly {
            return Pass::End(signal);
        }
        if !gate.wakers.iter().any(|known| known.will_wake(waker)) {
            gate.wakers.push(waker.clone());
        }
        if gate.paused || own.stopped {
            return Pass::Hold;
        }
        gate.throttle(Instant::now())
    }
}

/// Handles up to which every count is worth its time.
const FEW_HANDLES: u64 = 256;

/// The handles of one guest, which count for its container until this is dropped.
#[derive(Debug)]
pub(super) struct Handles {
    group: Arc<Group>,
    counted: u64,
    at: Option<Instant>,
}

impl Handles {
    /// Whether it is time to count again: counting takes as long as there are handles.
    pub(super) fn is_due(&self) -> bool {
        self.counted <= FEW_HANDLES || self.at.is_none_or(|at| at.elapsed() >= TICK)
    }

    pub(super) fn set(&mut self, handles: u64) {
        let sum = &self.group.handles;
        if handles >= self.counted {
            sum.fetch_add(handles - self.counted, Ordering::AcqRel);
        } else {
            sum.fetch_sub(self.counted - handles, Ordering::AcqRel);
        }
        self.counted = handles;
        self.at = (handles > FEW_HANDLES).then(Instant::now);
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Pass {
    Go,
    Hold,
    /// Not before then.
    Until(Instant),
    /// By this signal.
    End(u32),
}

impl Gate {
    fn throttle(&mut self, now: Instant) -> Pass {
        let Some(CpuQuota { quota, period }) = self.quota else {
            return Pass::Go;
        };
        let period = period.max(TICK);
        let began = *self.period_began.get_or_insert(now);
        let passed = now.saturating_duration_since(began);
        if passed >= period {
            let whole =
                u32::try_from(passed.as_nanos() / period.as_nanos().max(1)).unwrap_or(u32::MAX);
            self.used = self.used.saturating_sub(quota.saturating_mul(whole));
            self.period_began = began
                .checked_add(period.saturating_mul(whole))
                .or(Some(now));
            self.periods = self.periods.saturating_add(1);
        }
        if self.used < quota {
            return Pass::Go;
        }
        // A guest yields with a tick, which may be more than its quota: it pays that back.
        let owed = self.used.as_nanos() / quota.as_nanos().max(1);
        let owed = u32::try_from(owed).unwrap_or(u32::MAX).max(1);
        let until = self
            .period_began
            .unwrap_or(now)
            .checked_add(period.saturating_mul(owed))
            .unwrap_or(now);
        if self.held_until != Some(until) {
            self.held_until = Some(until);
            self.throttled = self.throttled.saturating_add(1);
            self.throttled_time += until.saturating_duration_since(now);
        }
        Pass::Until(until)
    }
}

/// A guest under control; resolves to the signal that ended it, or to its own result.
pub(super) struct Controlled<'a, F> {
    guest: Pin<Box<F>>,
    control: &'a Control,
    ticker: &'a Ticker,
    hold: Option<Pin<Box<Sleep>>>,
    /// By which the gate wakes it.
    waker: Option<Waker>,
}

impl<'a, F: Future> Controlled<'a, F> {
    pub(super) fn new(guest: F, control: &'a Control, ticker: &'a Ticker) -> Self {
        control.group.processes.fetch_add(1, Ordering::AcqRel);
        Self {
            guest: Box::pin(guest),
            control,
            ticker,
            hold: None,
            waker: None,
        }
    }
}

impl<F> Drop for Controlled<'_, F> {
    fn drop(&mut self) {
        self.control.group.processes.fetch_sub(1, Ordering::AcqRel);
        if let Some(own) = &self.waker {
            self.control
                .gate()
                .wakers
                .retain(|waker| !waker.will_wake(own));
        }
    }
}

impl<F: Future> Future for Controlled<'_, F> {
    type Output = Result<F::Output, u32>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.waker
            .get_or_insert_with(|| cx.waker().clone())
            .clone_from(cx.waker());
        loop {
            match self.control.pass(cx.waker()) {
                Pass::Go => break,
                Pass::End(signal) => return Poll::Ready(Err(signal)),
                Pass::Hold => return Poll::Pending,
                Pass::Until(until) => {
                    let mut sleep = Box::pin(tokio::time::sleep_until(until.into()));
                    let over = sleep.as_mut().poll(cx).is_ready();
                    self.hold = Some(sleep);
                    if !over {
                        return Poll::Pending;
                    }
                }
            }
        }
        self.hold = None;
        let before = thread_cpu();
        let polled = {
            let _running = self.ticker.guest_runs();
            self.guest.as_mut().poll(cx)
        };
        self.control.charge(thread_cpu().saturating_sub(before));
        polled.map(Ok)
    }
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(quota_ms: u64) -> Gate {
        Gate {
            quota: Some(CpuQuota {
                quota: Duration::from_millis(quota_ms),
                period: Duration::from_millis(100),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_quota_holds_back_until_it_is_paid() {
        let mut gate = quota(20);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(gate.throttle(start), Pass::Go);
        gate.used = Duration::from_millis(50);
        // 50 ms are two and a half quotas: two periods later there is some left.
        assert_eq!(gate.throttle(at(10)), Pass::Until(at(200)));
        assert_eq!(gate.throttle(at(200)), Pass::Go);
        assert_eq!(gate.used, Duration::from_millis(10));
        assert_eq!(
            (gate.throttled, gate.throttled_time),
            (1, Duration::from_millis(190))
        );
    }

    #[test]
    fn what_was_not_used_is_not_saved() {
        let mut gate = quota(20);
        let start = Instant::now();
        gate.throttle(start);
        gate.throttle(start + Duration::from_secs(10));
        assert_eq!(gate.used, Duration::ZERO);
        gate.used = Duration::from_millis(20);
        assert!(matches!(
            gate.throttle(start + Duration::from_secs(10)),
            Pass::Until(_)
        ));
    }

    #[test]
    fn signals_do_what_they_do_in_linux() {
        let control = Control::new(&Limits::default());
        let pass = || control.pass(Waker::noop());
        for ignored in IGNORED.into_iter().chain([0]) {
            control.signal(ignored);
        }
        assert_eq!(pass(), Pass::Go);
        control.signal(19);
        assert_eq!(pass(), Pass::Hold);
        control.signal(SIGCONT);
        assert_eq!(pass(), Pass::Go);
        control.pause(true);
        assert_eq!(pass(), Pass::Hold);
        control.signal(15);
        control.signal(9);
        assert_eq!(
            pass(),
            Pass::End(15),
            "the first one counts, even of a paused one"
        );
        let exec = control.exec();
        exec.pause(false);
        assert_eq!(
            exec.pass(Waker::noop()),
            Pass::Go,
            "an exec is a process of its own"
        );
        control.kill_all();
        assert_eq!(exec.pass(Waker::noop()), Pass::End(9));
    }

    #[test]
    fn a_gate_forgets_guests_that_are_gone() {
        let control = Control::new(&Limits::default());
        let engine = wasmtime::Engine::default();
        let ticker = Ticker::start(&engine).unwrap();
        let mut guest = Controlled::new(std::future::pending::<()>(), &control, &ticker);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut guest).poll(&mut cx).is_pending());
        assert_eq!(control.gate().wakers.len(), 1);
        drop(guest);
        assert_eq!(control.gate().wakers.len(), 0);
        assert_eq!(control.stats().processes, 0);
    }

    #[test]
    fn handles_of_all_guests_are_counted_together() {
        let control = Control::new(&Limits::default());
        let (mut one, mut two) = (control.handles(), control.exec().handles());
        one.set(300);
        assert!(!one.is_due() && two.is_due());
        two.set(5);
        assert_eq!(control.stats().handles, 305);
        one.set(1);
        assert_eq!(control.stats().handles, 6);
        drop((one, two));
        assert_eq!(control.stats().handles, 0);
    }

    #[test]
    fn shares_decide_how_long_a_turn_is() {
        let control = Control::new(&Limits::default());
        assert_eq!(control.slice(), USUAL_TICKS);
        for (cpu_shares, slice) in [(2, 1), (512, 1), (4096, 8), (1 << 18, MAX_TICKS)] {
            control.update(&Limits {
                cpu_shares,
                ..Default::default()
            });
            assert_eq!(control.slice(), slice);
        }
    }
}
