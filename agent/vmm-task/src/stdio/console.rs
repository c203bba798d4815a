//! The socket over which a terminal's master end comes out of the container.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use agent_api::rpc::Stdio;

use super::AgentEnds;
use crate::fd::Fd;
use crate::sys;

/// A listening socket with a short name of its own, removed with it.
#[derive(Debug)]
pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens in `dir`.
    pub fn bind(dir: &Path) -> io::Result<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("tty{serial}"));
        let listener = UnixListener::bind(&path)?;
        let socket = Self { path, listener };
        // The runtime has connected by the time we accept; if not, that is an error.
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Where the runtime connects.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master end that the new process has sent, and sizes the terminal.
    pub fn receive(self, wanted: &Stdio) -> io::Result<AgentEnds> {
        let (connection, _) = self.listener.accept()?;
        let master = sys::receive_fd(&connection)?;
        if wanted.width > 0 && wanted.height > 0 {
            sys::set_window_size(&master, clamp(wanted.width), clamp(wanted.height))?;
        }
        let stdin = if wanted.stdin {
            // Reading and writing wait in different tasks, each with a descriptor.
            Some(Fd::from_blocking(master.try_clone()?)?)
        } else {
            None
        };
        Ok(AgentEnds {
            stdin,
            stdout: Some(Fd::from_blocking(master)?),
            stderr: None,
        })
    }
}

/// A terminal dimension as the kernel stores it.
pub fn clamp(size: u32) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // The directory is the agent's own and goes away with the machine.
        let _ = fs::remove_file(&self.path);
    }
}
