//! Stays with a process from its start to its end: streams, signals, terminal size, deadline.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::client::{ProcessName, Task, is_code};
use super::error::{CliError, NOT_EXECUTABLE, NOT_FOUND, Result, TIMED_OUT};
use super::output::{Steps, note};
use super::root::is_wasm;
use super::signals::Signals;
use super::stdio::{Fifos, Streams};
use super::terminal::{self, RawMode};

/// From TERM to KILL after `--timeout`.
const GRACE: Duration = Duration::from_secs(10);

/// What a process is attended with.
#[derive(Debug)]
pub(super) struct Attended<'a> {
    pub(super) task: &'a Task,
    pub(super) name: &'a ProcessName,
    /// For messages when it cannot be started.
    pub(super) program: &'a str,
    pub(super) tty: bool,
    pub(super) interactive: bool,
    pub(super) timeout: Option<Duration>,
}

impl Attended<'_> {
    /// Starts a created process.
    pub(super) async fn start(&self) -> Result<()> {
        self.task
            .start(self.name)
            .await
            .map_err(|e| self.start_error(e))
    }

    /// Starts a created process and stays until it has ended and its output is written:
    /// the exit code for this process.
    pub(super) async fn run(
        &self,
        fifos: Fifos,
        signals: &mut Signals,
        steps: &Steps,
    ) -> Result<u8> {
        steps.done();
        // Before anything comes through: what was typed ahead is echoed by the process's terminal.
        let raw = match self.tty && self.interactive {
            true => Some(RawMode::enter()?),
            false => None,
        };
        let streams = fifos.connect()?;
        // Asked before the start, so that no exit is missed.
        let wait = {
            let (task, name) = (self.task.clone(), self.name.clone());
            AbortOnDropHandle::new(tokio::spawn(async move { task.wait(&name).await }))
        };
        self.resize().await;
        self.start().await?;
        self.resize().await;
        let ended = self.attend(streams, wait, signals).await;
        drop(raw);
        ended
    }

    async fn attend(
        &self,
        mut streams: Streams,
        mut wait: AbortOnDropHandle<Result<u32>>,
        signals: &mut Signals,
    ) -> Result<u8> {
        let mut deadline = self.timeout.and_then(|t| Instant::now().checked_add(t));
        let mut timed_out = false;
        let mut interrupts = 0_u32;
        let exit = loop {
            tokio::select! {
                exit = &mut wait => break exit,
                signal = signals.next() => match signal {
                    Signal::SIGWINCH => self.resize().await,
                    Signal::SIGINT => {
                        interrupts = interrupts.saturating_add(1);
                        self.interrupt(interrupts).await?;
                    }
                    other => self.task.kill(self.name, other as i32, false).await?,
                },
                () = streams.stdin_ended() => {
                    if let Err(e) = self.task.close_stdin(self.name).await {
                        tracing::debug!("stdin not closed: {}", e.what);
                    }
                }
                () = at(deadline) => {
                    let signal = if timed_out { Signal::SIGKILL } else { Signal::SIGTERM };
                    deadline = if timed_out { None } else { Instant::now().checked_add(GRACE) };
                    timed_out = true;
                    self.task.kill(self.name, signal as i32, signal == Signal::SIGKILL).await?;
                }
            }
        };
        let code = exit.map_err(|e| CliError::caused("waiting for the process failed", &e))??;
        streams.drained().await;
        if timed_out {
            let limit = self.timeout.unwrap_or_default();
            note(&format!("{} was ended after {limit:?}", self.program));
            return Ok(TIMED_OUT);
        }
        // Anything above is no exit code of Linux.
        Ok(u8::try_from(code).unwrap_or(u8::MAX))
    }

    /// The process decides what the first Ctrl-C means; the second leaves it no choice.
    async fn interrupt(&self, count: u32) -> Result<()> {
        let signal = if count > 1 {
            Signal::SIGKILL
        } else {
            Signal::SIGINT
        };
        self.task
            .kill(
                self.name,
                signal as i32,
                count > 1 && self.name.exec.is_empty(),
            )
            .await
    }

    async fn resize(&self) {
        if !self.tty {
            return;
        }
        let Some((columns, rows)) = terminal::size() else {
            return;
        };
        if let Err(e) = self.task.resize(self.name, columns, rows).await {
            tracing::debug!("terminal not resized: {}", e.what);
        }
    }

    fn start_error(&self, error: ttrpc::Error) -> CliError {
        let program = self.program;
        if is_code(&error, ttrpc::Code::NOT_FOUND) {
            CliError::new(format!("{program}: not found in the container"))
                .next("check the path, and that the root file system holds the program and its loader")
                .code(NOT_FOUND)
        } else if is_code(&error, ttrpc::Code::PERMISSION_DENIED) && is_wasm(program) {
            // The daemon has looked into it and knows why.
            CliError::from(error).code(NOT_EXECUTABLE)
        } else if is_code(&error, ttrpc::Code::PERMISSION_DENIED) {
            CliError::new(format!("{program}: cannot be executed"))
                .next("check that it is a program for this machine, with permission to execute")
                .code(NOT_EXECUTABLE)
        } else {
            let cause = CliError::from(error);
            CliError {
                what: format!("cannot start {program}: {}", cause.what),
                ..cause
            }
        }
    }
}

/// Completes at `deadline`; never without one.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
