//! Logging programs: `binary://path?key=value`.
//!
//! containerd's contract: the program gets stdout and stderr of the process on its file
//! descriptors 3 and 4, says that it is ready by closing 5, and finds the container's name
//! in its environment. The keys and values of the query are its arguments.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::super::error::{PodError, Result};
use super::LogOwner;

/// How long a logging program may take to say that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// A running logging program. It ends by itself when its pipes close.
#[derive(Debug)]
pub(super) struct Logger {
    #[cfg_attr(not(test), expect(dead_code))]
    child: Child,
}

impl Logger {
    /// Starts the program of a `binary://` URL (the part after the scheme) and waits until
    /// it is ready; returns the write ends for stdout and stderr.
    pub(super) async fn start(
        url: &str,
        owner: &LogOwner,
    ) -> Result<(Self, pipe::Sender, pipe::Sender)> {
        let (program, arguments) = parse(url)?;
        let failed = || format!("starting the logging program {}", program.display());
        let new_pipe = || pipe2(OFlag::O_CLOEXEC).map_err(PodError::io(failed()));
        let (stdout, stdout_writer) = new_pipe()?;
        let (stderr, stderr_writer) = new_pipe()?;
        let (ready, ready_writer) = new_pipe()?;
        let mut command = std::process::Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", &owner.container_id)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let map = |parent_fd: OwnedFd, child_fd| FdMapping {
            parent_fd,
            child_fd,
        };
        command
            .fd_mappings(vec![map(stdout, 3), map(stderr, 4), map(ready_writer, 5)])
            .map_err(|e| PodError::io(failed())(std::io::Error::other(e)))?;
        let child = {
            let mut command = Command::from(command);
            command.spawn().map_err(PodError::io(failed()))?
            // The command holds the child's ends of the pipes: they close here.
        };
        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(PodError::io(failed()))?;
        let mut byte = [0];
        timeout(READY_LIMIT, ready.read(&mut byte))
            .await
            .map_err(|_| {
                PodError::io(failed())(std::io::Error::from(std::io::ErrorKind::TimedOut))
            })?
            .map_err(PodError::io(failed()))?;
        let sender = |fd: OwnedFd| pipe::Sender::from_owned_fd(fd).map_err(PodError::io(failed()));
        let stdout = sender(stdout_writer)?;
        let stderr = sender(stderr_writer)?;
        Ok((Self { child }, stdout, stderr))
    }
}

#[cfg(test)]
impl Logger {
    /// Waits for the end of the program.
    pub(super) async fn wait(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }
}

fn parse(url: &str) -> Result<(PathBuf, Vec<String>)> {
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let path = Path::new(path);
    if !path.is_absolute() {
        return Err(PodError::invalid(
            "stdout",
            format!("binary://{url}"),
            "the path of the logging program must be absolute",
        ));
    }
    let mut arguments = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        arguments.push(key.into_owned());
        if !value.is_empty() {
            arguments.push(value.into_owned());
        }
    }
    Ok((path.to_owned(), arguments))
}
