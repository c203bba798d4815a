//! Containers and what runs in them.

mod control;
mod http;
mod memory;
mod run;
mod state;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{oneshot, watch};

pub(crate) use memory::Budget;
pub(crate) use state::State;

use self::control::Control;
use self::memory::Account;
use crate::config::{Limits, Settings};
use crate::error::{Result, WasmError};
use crate::host::Host;
use crate::lane::Lane;
use crate::program::Program;
use crate::stdio::Stdio;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// What the guest returned, or 128 + signal.
    pub code: u32,
    /// When.
    pub at: SystemTime,
    /// Why.
    pub ended: Ended,
}

/// Why a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest said so.
    Exited,
    /// A signal.
    Signal(u32),
    /// The guest did what it must not: trap, stack overflow, refused host call; 134.
    Trap(String),
    /// The guest wanted more memory than its limit, and ended for it; 137.
    OutOfMemory,
    /// It ran for longer than [`Limits::wall_time`]; 137.
    WallTime,
    /// The host failed; 134.
    Host(String),
}

/// Figures of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time of its guests, host functions included.
    pub cpu: Duration,
    /// Times it was held back for its quota.
    pub throttled: u64,
    /// How long that took in all.
    pub throttled_time: Duration,
    /// Periods of its quota in which it ran.
    pub periods: u64,
    /// Linear memory now, in bytes.
    pub memory_bytes: u64,
    /// The most it ever was, in bytes.
    pub memory_peak_bytes: u64,
    /// Its limit, in bytes; 0: none.
    pub memory_limit_bytes: u64,
    /// Times it ended for want of memory.
    pub out_of_memory: u64,
    /// Handles its guests hold: files, sockets, streams.
    pub handles: u64,
    /// Guests that run.
    pub processes: u64,
}

/// A container: what its processes have in common. Clones are the same container.
#[derive(Clone, Debug)]
pub struct Container {
    host: Host,
    settings: Arc<Settings>,
    account: Arc<Account>,
    control: Arc<Control>,
}

/// A running or ended program of a container.
#[derive(Clone, Debug)]
pub struct Process {
    control: Arc<Control>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Host {
    /// A container in which nothing runs yet.
    #[must_use]
    pub fn container(&self, settings: Settings) -> Container {
        let limits = &settings.limits;
        Container {
            host: self.clone(),
            account: Account::new(&self.inner.budget, limits.memory_bytes),
            control: Arc::new(Control::new(limits)),
            settings: Arc::new(settings),
        }
    }
}

impl Container {
    /// Runs `program` on `lane`. Returns once it runs.
    ///
    /// # Errors
    /// The memory limit is too low, a mount cannot be opened, or the host has no room for
    /// another instance.
    pub async fn start(
        &self,
        lane: &Lane,
        program: &Arc<Program>,
        stdio: Stdio,
    ) -> Result<Process> {
        self.start_with(lane, program, stdio, None).await
    }

    /// Runs another program in the container, or the same with other arguments: `settings`
    /// replaces arguments, environment and working directory. Memory, limits and signals to
    /// the container are shared.
    ///
    /// # Errors
    /// As for [`Container::start`].
    pub async fn exec(
        &self,
        lane: &Lane,
        program: &Arc<Program>,
        stdio: Stdio,
        settings: Settings,
    ) -> Result<Process> {
        let settings = Settings {
            mounts: self.settings.mounts.clone(),
            network: self.settings.network,
            http_listen: self.settings.http_listen,
            limits: self.settings.limits.clone(),
            ..settings
        };
        self.start_with(lane, program, stdio, Some(Arc::new(settings)))
            .await
    }

    async fn start_with(
        &self,
        lane: &Lane,
        program: &Arc<Program>,
        stdio: Stdio,
        settings: Option<Arc<Settings>>,
    ) -> Result<Process> {
        program.check_memory(self.account.limit())?;
        let control = match &settings {
            None => Arc::clone(&self.control),
            Some(_) => Arc::new(self.control.exec()),
        };
        let (exit, exited) = watch::channel(None);
        let (started, start) = oneshot::channel();
        let job = run::Job {
            host: self.host.clone(),
            settings: settings.unwrap_or_else(|| Arc::clone(&self.settings)),
            program: Arc::clone(program),
            account: Arc::clone(&self.account),
            control: Arc::clone(&control),
        };
        lane.spawn(job.run(stdio, started, exit));
        start.await.unwrap_or_else(|_| {
            Err(WasmError::Engine(
                "the thread for guests has ended".to_owned(),
            ))
        })?;
        Ok(Process {
            control,
            exit: exited,
        })
    }

    /// Holds its guests where they are.
    pub fn pause(&self) {
        self.control.pause(true);
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.control.pause(false);
    }

    /// Ends all its guests.
    pub fn kill(&self) {
        self.control.kill_all();
    }

    /// Replaces limits of memory and CPU.
    pub fn update(&self, limits: &Limits) {
        self.account.set_limit(limits.memory_bytes);
        self.control.update(limits);
    }

    /// Figures now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.control.stats();
        self.account.describe(&mut stats);
        stats
    }
}

impl Process {
    /// Waits for the end; any number of callers may.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone(),
            Err(_) => None,
        }
        .unwrap_or_else(|| Exit {
            code: 134,
            at: SystemTime::now(),
            ended: Ended::Host("the thread for guests has ended".to_owned()),
        })
    }

    /// The end, if it has come.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Sends a signal. WebAssembly knows none: the default action is taken, at the next host
    /// call or within milliseconds of computing. `SIGTERM`, `SIGINT` and `SIGQUIT` let a server
    /// of HTTP requests finish those under way.
    pub fn signal(&self, signal: u32) {
        self.control.signal(signal);
    }
}
