//! The standard streams of a process, between what the Task API names and the guest.
//!
//! A stream is named by the path of a fifo, `file://path`, `binary://path?args` (a logging
//! program, for stdout and stderr together), the address of the Task API with an id (see
//! [`Streams`]) or nothing. The write ends of fifos close when
//! the process has exited and its output is drained, since containerd waits for that before
//! it deletes a task; a read end stays open until then, so that a reader which restarts in
//! between loses nothing.

mod copy;
mod input;
mod logger;
mod output;
mod streams;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::rpc;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use vmm_core::vm::GuestStream;

use self::input::Input;
use self::logger::Logger;
use self::output::Output;
pub(crate) use self::streams::{End as StreamEnd, Outlet, Streams};
use super::error::{PodError, Result};

/// Where the streams of a process go, as the Task API names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioPaths {
    /// Fifo to read from; empty: none.
    pub stdin: String,
    /// Fifo or URL to write to; empty: discarded.
    pub stdout: String,
    /// As `stdout`; ignored with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal: its output is all in `stdout`.
    pub terminal: bool,
}

impl StdioPaths {
    /// Which streams the guest has to provide.
    pub(crate) fn to_rpc(&self) -> rpc::Stdio {
        rpc::Stdio {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty() && !self.terminal,
            terminal: self.terminal,
            ..Default::default()
        }
    }
}

/// Who a logging program writes for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOwner {
    /// containerd's namespace; empty if the caller named none.
    pub namespace: String,
    /// The container.
    pub container_id: String,
}

/// One end of a process's streams on the host, opened but not yet connected.
#[derive(Debug)]
pub struct HostStdio {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Logger>,
}

/// The matching ends in the guest.
#[derive(Default)]
pub struct GuestStdio {
    /// To the process.
    pub stdin: Option<Box<dyn GuestStream>>,
    /// From the process.
    pub stdout: Option<Box<dyn GuestStream>>,
    /// From the process.
    pub stderr: Option<Box<dyn GuestStream>>,
}

impl std::fmt::Debug for GuestStdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestStdio")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .finish()
    }
}

impl HostStdio {
    /// Opens what `paths` name. Never waits for the other end of a fifo.
    ///
    /// # Errors
    /// Names the stream and the path that cannot be opened.
    pub async fn open(
        paths: &StdioPaths,
        owner: &LogOwner,
        streams: &Arc<Streams>,
    ) -> Result<Self> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => Some(Input::open(path, streams)?),
        };
        let wants_stderr = !paths.terminal && !paths.stderr.is_empty();
        if let Some(url) = paths.stdout.strip_prefix("binary://") {
            let (logger, stdout, stderr) = Logger::start(url, owner).await?;
            return Ok(Self {
                stdin,
                stdout: Some(Output::from_pipe(stdout)),
                stderr: wants_stderr.then(|| Output::from_pipe(stderr)),
                logger: Some(logger),
            });
        }
        let open = |field: &'static str, name: &str| match name {
            "" => Ok(None),
            name => Output::open(field, name, streams).map(Some),
        };
        Ok(Self {
            stdin,
            stdout: open("stdout", &paths.stdout)?,
            stderr: if wants_stderr {
                open("stderr", &paths.stderr)?
            } else {
                None
            },
            logger: None,
        })
    }

    /// Starts copying between the host's and the guest's ends. Output of an exited process
    /// may be silent for `drain` before it counts as ended; `stdin_ended` runs once all of
    /// stdin was sent.
    #[must_use]
    pub fn connect(
        self,
        guest: GuestStdio,
        drain: Duration,
        stdin_ended: impl Future<Output = ()> + Send + 'static,
    ) -> Stdio {
        let (exited, exit_seen) = watch::channel(false);
        let mut outputs = Vec::new();
        let mut keepers = Vec::new();
        for (host, stream) in [(self.stdout, guest.stdout), (self.stderr, guest.stderr)] {
            let (Some(mut host), Some(stream)) = (host, stream) else {
                continue;
            };
            keepers.extend(host.take_keeper());
            let copy = copy::output(stream, host, exit_seen.clone(), drain);
            outputs.push(AbortOnDropHandle::new(tokio::spawn(copy)));
        }
        let (input, closer) = match (self.stdin, guest.stdin) {
            (Some(mut host), Some(stream)) => {
                let closer = host.take_closer();
                let copy = copy::input(host, stream, exit_seen, stdin_ended);
                (Some(AbortOnDropHandle::new(tokio::spawn(copy))), closer)
            }
            _ => (None, None),
        };
        Stdio {
            exited,
            outputs: Mutex::new(outputs),
            closer: Mutex::new(closer),
            _input: input,
            _keepers: keepers,
            logger: self.logger,
        }
    }
}

/// Running streams of a process; dropping it closes everything.
#[derive(Debug)]
pub struct Stdio {
    exited: watch::Sender<bool>,
    outputs: Mutex<Vec<AbortOnDropHandle<()>>>,
    closer: Mutex<Option<input::Closer>>,
    _input: Option<AbortOnDropHandle<()>>,
    _keepers: Vec<output::Keeper>,
    /// Ends by itself once its pipes are closed.
    #[cfg_attr(not(test), expect(dead_code))]
    logger: Option<Logger>,
}

impl Stdio {
    /// The caller of the API has closed its end of stdin: the process sees end of file once
    /// every other writer has closed its end too and all was read.
    pub fn close_stdin(&self) {
        drop(lock(&self.closer).take());
    }

    /// The process has exited: input stops now, output once it is drained.
    pub fn process_exited(&self) {
        drop(lock(&self.closer).take());
        self.exited.send_replace(true);
    }

    /// Waits until all output of an exited process is in the host's hands.
    pub async fn drained(&self) {
        let outputs = std::mem::take(&mut *lock(&self.outputs));
        for output in outputs {
            let _ = output.await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The path in `file://path`, `fifo://path` or a bare path.
fn path_of(field: &'static str, name: &str) -> Result<PathBuf> {
    let path = match name.split_once("://") {
        None => name,
        Some(("file" | "fifo", path)) => path,
        Some(_) => {
            return Err(PodError::invalid(
                field,
                name,
                "use the path of a fifo, file://, binary:// or ttrpc+unix://",
            ));
        }
    };
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    Err(PodError::invalid(field, name, "the path must be absolute"))
}
