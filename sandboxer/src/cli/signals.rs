//! The signals that end or inform a process, as a stream.

use nix::sys::signal::Signal;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

use super::error::{Doing, Result};

/// Signals of this process; while it lives they no longer end the process by themselves.
#[derive(Debug)]
pub(super) struct Signals {
    hangup: Stream,
    interrupt: Stream,
    quit: Stream,
    terminate: Stream,
    user1: Stream,
    user2: Stream,
    window: Stream,
}

impl Signals {
    pub(super) fn new() -> Result<Self> {
        let listen = |kind: SignalKind| signal(kind).doing(|| "listen for signals".to_owned());
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            terminate: listen(SignalKind::terminate())?,
            user1: listen(SignalKind::user_defined1())?,
            user2: listen(SignalKind::user_defined2())?,
            window: listen(SignalKind::window_change())?,
        })
    }

    /// The next signal. Cancel safe.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.hangup.recv() => Signal::SIGHUP,
            Some(()) = self.interrupt.recv() => Signal::SIGINT,
            Some(()) = self.quit.recv() => Signal::SIGQUIT,
            Some(()) = self.terminate.recv() => Signal::SIGTERM,
            Some(()) = self.user1.recv() => Signal::SIGUSR1,
            Some(()) = self.user2.recv() => Signal::SIGUSR2,
            Some(()) = self.window.recv() => Signal::SIGWINCH,
            else => std::future::pending().await,
        }
    }

    /// The next signal that asks this process to end.
    pub(super) async fn next_ending(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if matches!(
                signal,
                Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM
            ) {
                return signal;
            }
        }
    }
}

/// Exit code of something that `signal` ended.
pub(super) fn exit_code(signal: Signal) -> u8 {
    u8::try_from(signal as i32).map_or(u8::MAX, |n| n.saturating_add(128))
}
