//! Processes that are not our children, told apart from others that get their number.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process by number and start: unlike the number alone never another one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since the host booted.
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).map_err(io::Error::other)?;
        let stat = procfs::process::Process::new(number).and_then(|process| process.stat());
        let start_time = stat.map_err(io::Error::other)?.starttime;
        Ok(Self { pid, start_time })
    }

    /// Opens it; `None` when it has ended.
    ///
    /// # Errors
    /// The kernel has no pidfds or no fds.
    pub fn open(self) -> io::Result<Option<Process>> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(pid) = pid else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(err) => return Err(err.into()),
        };
        // Looked at after it was opened: whose number it was before does not matter.
        let same = Self::of(self.pid).is_ok_and(|now| now == self);
        let process = Process { id: self, fd };
        Ok((same && !process.has_ended()).then_some(process))
    }
}

/// Threads of a process by the beginning of their names.
pub(crate) fn threads_named(pid: u32, prefix: &str) -> Vec<i32> {
    let pid = i32::try_from(pid).unwrap_or(0);
    let tasks = procfs::process::Process::new(pid).and_then(|process| process.tasks());
    let tasks = tasks.into_iter().flatten().flatten();
    let is_one =
        |task: &procfs::process::Task| task.stat().is_ok_and(|stat| stat.comm.starts_with(prefix));
    tasks.filter(is_one).map(|task| task.tid).collect()
}

/// A process held by a pidfd.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    fd: OwnedFd,
}

impl Process {
    /// Which.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.fd, Signal::TERM);
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
    }

    /// Whether it has ended, collected by its parent or not.
    fn has_ended(&self) -> bool {
        matches!(self.poll(Some(&Timespec::default())), Ok(1..))
    }

    /// Waits for its end. Blocks.
    pub fn wait_blocking(&self) {
        while let Err(rustix::io::Errno::INTR) = self.poll(None) {}
    }

    /// How many of one have ended within `limit`.
    fn poll(&self, limit: Option<&Timespec>) -> rustix::io::Result<usize> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        rustix::event::poll(&mut fds, limit)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It cannot be watched.
    pub async fn ended(&self) -> io::Result<()> {
        let fd = self.fd.try_clone()?;
        // SAFETY: the `AsyncFd` owns the fd, and gives nobody else a way to close it.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        fd.readable().await.map(drop)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_known_by_number_and_start() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let other = ProcessId {
            start_time: id.start_time + 1,
            ..id
        };
        assert!(other.open().unwrap().is_none());
        let process = id.open().unwrap().unwrap();
        process.kill();
        process.ended().await.unwrap();
        child.wait().unwrap();
        assert!(id.open().unwrap().is_none());
    }
}
