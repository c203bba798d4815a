//! A terminal for programs that want one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

/// A child process on a pseudo-terminal.
#[derive(Debug)]
pub struct OnPty {
    /// The process.
    pub child: Child,
    master: File,
    /// Everything the terminal has shown.
    pub shown: String,
}

impl OnPty {
    /// Starts `command` with a terminal of `rows` x `cols` as stdin, stdout and stderr.
    ///
    /// # Panics
    /// When no terminal can be had or the command cannot be started.
    #[must_use]
    pub fn spawn(mut command: Command, rows: u16, cols: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).expect("open a pseudo-terminal");
        let clone = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("dup the terminal"));
        command
            .stdin(clone(&pty.slave))
            .stdout(clone(&pty.slave))
            .stderr(clone(&pty.slave));
        // SAFETY: setsid and the ioctl are async-signal-safe and touch no memory of ours.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().expect("start on the terminal");
        Self {
            child,
            master: File::from(pty.master),
            shown: String::new(),
        }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.master
            .write_all(text.as_bytes())
            .expect("write to the terminal");
    }

    /// Changes the terminal's size; the kernel tells the process by SIGWINCH.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn resize(&self, rows: u16, cols: u16) {
        use std::os::fd::AsRawFd;
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one Winsize, which lives across the call.
        let rc = unsafe {
            nix::libc::ioctl(
                self.master.as_raw_fd(),
                nix::libc::TIOCSWINSZ,
                &raw const size,
            )
        };
        assert_eq!(rc, 0, "resize the terminal");
    }

    /// Reads until the terminal has shown `text`.
    ///
    /// # Panics
    /// When it does not within `limit`, or the terminal closes first.
    pub fn wait_for(&mut self, text: &str, limit: Duration) {
        let end = Instant::now() + limit;
        while !self.shown.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{text:?} not shown within {limit:?}: {}",
                self.shown
            );
            assert!(
                self.read_some(left),
                "terminal closed before {text:?}: {}",
                self.shown
            );
        }
    }

    /// Reads what is there, waiting at most `limit` for the first byte; false at the end.
    fn read_some(&mut self, limit: Duration) -> bool {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, timeout).expect("poll the terminal") == 0 {
            return true;
        }
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.shown.push_str(&String::from_utf8_lossy(&bytes[..n]));
                true
            }
        }
    }

    /// Reads to the end and returns the exit code.
    ///
    /// # Panics
    /// When the process does not end within `limit`.
    pub fn finish(&mut self, limit: Duration) -> Option<i32> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if !self.read_some(Duration::from_millis(200)) {
                break;
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.code();
            }
        }
        let left = end
            .saturating_duration_since(Instant::now())
            .max(Duration::from_secs(1));
        crate::eventually("the end of the program on the terminal", left, || {
            self.child.try_wait().expect("wait for the program")
        })
        .code()
    }
}

impl Drop for OnPty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
