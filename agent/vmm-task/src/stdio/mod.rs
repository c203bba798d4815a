//! A process's standard streams: the ends it gets and the ends the agent keeps.

mod console;
mod pump;

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_api::rpc::Stdio;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

pub use self::console::ConsoleSocket;
pub use self::pump::{ProcessName, Pumps};
use crate::error::AgentError;
use crate::fd::Fd;

/// What the process gets.
#[derive(Debug)]
pub enum ProcessEnds {
    /// Descriptors 0, 1 and 2.
    Files {
        /// Read by the process.
        stdin: OwnedFd,
        /// Written by the process.
        stdout: OwnedFd,
        /// Written by the process.
        stderr: OwnedFd,
    },
    /// A terminal, whose master end arrives over this socket.
    Terminal(ConsoleSocket),
}

/// What the agent keeps, each end only when the host wants it.
#[derive(Debug, Default)]
pub struct AgentEnds {
    /// Written by the agent.
    pub stdin: Option<Fd>,
    /// Read by the agent.
    pub stdout: Option<Fd>,
    /// Read by the agent.
    pub stderr: Option<Fd>,
}

/// Makes the ends for what the host asked for. Streams nobody wants are `/dev/null`.
///
/// The agent's ends of a terminal exist only once the process does: see
/// [`ConsoleSocket::receive`].
pub fn open(wanted: &Stdio, dir: &Path) -> Result<(ProcessEnds, AgentEnds), AgentError> {
    if wanted.terminal {
        let socket = ConsoleSocket::bind(dir).map_err(AgentError::io("console socket"))?;
        return Ok((ProcessEnds::Terminal(socket), AgentEnds::default()));
    }
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|e| AgentError::io("pipe2")(e.into()));
    let null = || {
        let file = OpenOptions::new().read(true).write(true).open("/dev/null");
        file.map(OwnedFd::from).map_err(AgentError::io("/dev/null"))
    };
    let ours = |fd| {
        Fd::from_blocking(fd)
            .map(Some)
            .map_err(AgentError::io("O_NONBLOCK"))
    };
    let mut agent = AgentEnds::default();
    let stdin = if wanted.stdin {
        let (read, write) = pipe()?;
        agent.stdin = ours(write)?;
        read
    } else {
        null()?
    };
    let stdout = if wanted.stdout {
        let (read, write) = pipe()?;
        agent.stdout = ours(read)?;
        write
    } else {
        null()?
    };
    let stderr = if wanted.stderr {
        let (read, write) = pipe()?;
        agent.stderr = ours(read)?;
        write
    } else {
        null()?
    };
    Ok((
        ProcessEnds::Files {
            stdin,
            stdout,
            stderr,
        },
        agent,
    ))
}
