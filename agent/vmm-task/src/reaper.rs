//! Collects ended children, its own and those the kernel hands to PID 1.

use std::io;
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::agent::Agent;
use crate::fd::Fd;
use crate::sys;

/// Two `signalfd_siginfo`: with room to spare a read shows that nothing is left.
const INFO_BYTES: usize = 256;

/// Turns SIGCHLD into a descriptor. A signal handler would cost four more system calls per
/// child, and its pipe would be shared with the forked children.
#[derive(Debug)]
pub struct Reaper(Fd);

impl Reaper {
    /// Blocks SIGCHLD; programs get it unblocked again before they are executed.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self(Fd::new(fd.into())))
    }

    /// Reaps for ever.
    pub async fn run(mut self, agent: Arc<Agent>) -> io::Error {
        let mut info = [0; INFO_BYTES];
        loop {
            if let Err(e) = self.0.read(&mut info).await {
                return e;
            }
            // One signal may stand for many children.
            while let Some((pid, status)) = sys::reap_one() {
                agent.child_ended(pid, status);
            }
        }
    }
}
