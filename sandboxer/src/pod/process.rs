//! A process of a container, as the Task API sees it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use super::error::{PodError, Result};
use super::stdio::{Stdio, StdioPaths};
use crate::agent::ProcessId;

/// Exit code of whatever was running when its VM ended: as if killed.
pub const KILLED: u32 = 137;

/// How something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0-255, or 128 + signal.
    pub code: u32,
    /// When the daemon learnt of it.
    pub at: SystemTime,
}

impl Exit {
    /// Ended now.
    #[must_use]
    pub fn now(code: u32) -> Self {
        Self {
            code,
            at: SystemTime::now(),
        }
    }
}

/// Where a process is in its life. It only moves down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// The guest is told to create it.
    Creating,
    /// Exists, not started.
    Created,
    /// The guest is told to start it.
    Starting,
    /// Runs.
    Running,
    /// Has ended.
    Exited(Exit),
}

impl ProcessState {
    /// Name for error messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Exited(_) => "stopped",
        }
    }
}

/// A process of a container: its init process or an exec.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    stdio_paths: StdioPaths,
    pid: AtomicU32,
    state: watch::Sender<ProcessState>,
    stdio: Mutex<Option<Arc<Stdio>>>,
}

impl Process {
    pub(super) fn new(id: ProcessId, stdio_paths: StdioPaths) -> Self {
        Self {
            id,
            stdio_paths,
            pid: AtomicU32::new(0),
            state: watch::Sender::new(ProcessState::Creating),
            stdio: Mutex::new(None),
        }
    }

    /// Names the process.
    #[must_use]
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Where its streams go.
    #[must_use]
    pub fn stdio_paths(&self) -> &StdioPaths {
        &self.stdio_paths
    }

    /// The guest's pid; 0 while there is none.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Acquire)
    }

    /// Its state now.
    #[must_use]
    pub fn state(&self) -> ProcessState {
        *self.state.borrow()
    }

    /// Waits for the end of the process; any number of callers may.
    pub async fn wait(&self) -> Exit {
        let mut states = self.state.subscribe();
        loop {
            if let ProcessState::Exited(exit) = *states.borrow_and_update() {
                return exit;
            }
            // The sender lives in `self`, so this cannot fail.
            if states.changed().await.is_err() {
                return Exit::now(KILLED);
            }
        }
    }

    pub(super) fn created(&self, pid: u32, stdio: Stdio) {
        self.pid.store(pid, Ordering::Release);
        *self.lock_stdio() = Some(Arc::new(stdio));
        self.advance(ProcessState::Creating, ProcessState::Created);
    }

    /// Begins a start, which only one caller can.
    pub(super) fn begin_start(&self) -> Result<()> {
        if self.advance(ProcessState::Created, ProcessState::Starting) {
            return Ok(());
        }
        Err(self.wrong_state("start"))
    }

    pub(super) fn started(&self, pid: u32) {
        self.pid.store(pid, Ordering::Release);
        // It may have exited before the guest's answer arrived.
        self.advance(ProcessState::Starting, ProcessState::Running);
    }

    /// The guest could not start it: it stays created, as a caller may try again or delete.
    pub(super) fn start_failed(&self) {
        self.advance(ProcessState::Starting, ProcessState::Created);
    }

    /// Records the end; the first report counts.
    pub(super) fn exited(&self, exit: Exit) -> bool {
        let ended = self.state.send_if_modified(|state| {
            if matches!(state, ProcessState::Exited(_)) {
                return false;
            }
            *state = ProcessState::Exited(exit);
            true
        });
        if let Some(stdio) = self.stdio() {
            stdio.process_exited();
        }
        ended
    }

    /// Closes all streams at once.
    pub(super) fn close_stdio(&self) {
        drop(self.lock_stdio().take());
    }

    pub(super) fn stdio(&self) -> Option<Arc<Stdio>> {
        self.lock_stdio().clone()
    }

    pub(super) fn wrong_state(&self, action: &'static str) -> PodError {
        let (what, id) = self.what();
        PodError::State {
            action,
            what,
            id,
            state: self.state().name().to_owned(),
        }
    }

    /// Kind and id for messages.
    pub(super) fn what(&self) -> (&'static str, String) {
        if self.id.exec_id.is_empty() {
            ("container", self.id.container_id.clone())
        } else {
            ("exec", self.id.exec_id.clone())
        }
    }

    fn advance(&self, from: ProcessState, to: ProcessState) -> bool {
        self.state.send_if_modified(|state| {
            let moves = *state == from;
            if moves {
                *state = to;
            }
            moves
        })
    }

    fn lock_stdio(&self) -> std::sync::MutexGuard<'_, Option<Arc<Stdio>>> {
        self.stdio.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
