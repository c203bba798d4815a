//! The daemon's side of a supervisor.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::run::replace;
use super::{EXIT_FILE, Ended, Job, LIFELINE_FD, READY_FD, Ready};
use crate::hypervisor::HvError;
use crate::process::{Process, ProcessId};

/// The job, in the VM's folder.
const JOB_FILE: &str = "vmm-job.json";
/// Who runs the VM, in the VM's folder: what a later daemon needs.
const PROCESSES_FILE: &str = "vmm.json";
/// What the supervisor itself has to say.
const LOG_FILE: &str = "supervisor.log";

/// The processes of a VM, as a later daemon finds them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Processes {
    version: u32,
    supervisor: ProcessId,
    vmm: ProcessId,
}

const VERSION: u32 = 1;

/// A VM's supervisor and, through it, its VMM.
#[derive(Debug)]
pub struct Supervisor {
    dir: PathBuf,
    process: Process,
    vmm: Process,
    /// Of this process; to be reaped.
    child: Option<Child>,
    /// Open as long as the VM may live.
    _lifeline: Option<io::PipeWriter>,
}

impl Supervisor {
    /// Starts `program` on a job, and waits until its VMM runs.
    pub(crate) async fn launch(
        program: &Path,
        job: &Job,
        fds: Vec<(OwnedFd, i32)>,
        limit: Duration,
    ) -> Result<Self, HvError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |err: io::Error| HvError::Supervisor(format!("{what}: {err}"))
        };
        let text = serde_json::to_vec_pretty(job).map_err(io::Error::from);
        let path = job.dir.join(JOB_FILE);
        text.and_then(|text| replace(&path, &text))
            .map_err(failed("writing its job"))?;
        let (ready, tell) = io::pipe().map_err(failed("making a pipe"))?;
        let mut fds = fds;
        fds.push((tell.into(), READY_FD));
        let lifeline = if job.lifeline {
            let (held, lifeline) = io::pipe().map_err(failed("making a pipe"))?;
            fds.push((held.into(), LIFELINE_FD));
            Some(lifeline)
        } else {
            None
        };
        let log = fs::File::create(job.dir.join(LOG_FILE)).map_err(failed("making its log"))?;
        let spawn = {
            let (program, path) = (program.to_owned(), path.clone());
            move || spawn(&program, &path, fds, log)
        };
        let child = tokio::task::spawn_blocking(spawn)
            .await
            .map_err(|err| HvError::Supervisor(err.to_string()))?
            .map_err(failed(&program.display().to_string()))?;
        let mut child = Ending(Some(child));
        let opened = ProcessId::of(child.id()).and_then(ProcessId::open);
        let process = opened
            .map_err(failed("opening its process"))?
            .ok_or_else(|| HvError::Supervisor("it ended at once".to_owned()))?;
        let vmm = Self::vmm(ready, limit).await?;
        let opened = vmm.open().map_err(failed("opening the VMM's process"))?;
        let Some(vmm) = opened else {
            // It ran, and has ended: the supervisor says how.
            let _ = timeout(limit, process.ended()).await;
            return Err(HvError::EarlyExit {
                vmm: "the VMM",
                how: read_end(&job.dir).to_string(),
            });
        };
        let supervisor = Self {
            dir: job.dir.clone(),
            process,
            vmm,
            child: child.0.take(),
            _lifeline: lifeline,
        };
        supervisor.record().map_err(failed("recording it"))?;
        Ok(supervisor)
    }

    async fn vmm(ready: io::PipeReader, limit: Duration) -> Result<ProcessId, HvError> {
        let read = async {
            let ready = pipe::Receiver::from_owned_fd(ready.into())?;
            let mut line = String::new();
            BufReader::new(ready).read_line(&mut line).await?;
            io::Result::Ok(line)
        };
        let line = timeout(limit, read)
            .await
            .map_err(|_| HvError::Supervisor(format!("it is not ready after {limit:?}")))?
            .map_err(|err| HvError::Supervisor(err.to_string()))?;
        match serde_json::from_str(&line) {
            Ok(Ready::Running(vmm)) => Ok(vmm),
            Ok(Ready::Failed(why)) => Err(HvError::Supervisor(why)),
            Err(_) => Err(HvError::Supervisor("it ended without a word".to_owned())),
        }
    }

    /// The supervisor of a VM that an earlier daemon started; `None` when there is none that
    /// runs.
    ///
    /// # Errors
    /// The record cannot be read, is of another version, or the processes cannot be opened.
    pub fn find(dir: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read(dir.join(PROCESSES_FILE)) {
            Ok(text) => text,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(err),
        };
        let processes: Processes = serde_json::from_slice(&text)?;
        if processes.version != VERSION {
            let why = format!("{PROCESSES_FILE} has version {}", processes.version);
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let (Some(process), Some(vmm)) = (processes.supervisor.open()?, processes.vmm.open()?)
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            dir: dir.to_owned(),
            process,
            vmm,
            child: None,
            _lifeline: None,
        }))
    }

    fn record(&self) -> io::Result<()> {
        let processes = Processes {
            version: VERSION,
            supervisor: self.process.id(),
            vmm: self.vmm.id(),
        };
        replace(
            &self.dir.join(PROCESSES_FILE),
            &serde_json::to_vec_pretty(&processes)?,
        )
    }

    /// The VMM's process id.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.id().pid
    }

    /// The supervisor's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id().pid
    }

    /// Asks it to end the VM.
    pub fn terminate(&self) {
        self.process.terminate();
    }

    /// Ends the VM, asking nobody.
    pub fn kill(&self) {
        // The VMM dies with its parent; it is killed first so that it is not missed should
        // it have become somebody else's child.
        self.vmm.kill();
        self.process.kill();
    }

    /// Waits until both have ended, once they were killed. Blocks.
    pub fn wait_blocking(&self) {
        self.process.wait_blocking();
        self.vmm.wait_blocking();
    }

    /// Waits until both have ended.
    pub(crate) async fn ended(&self) -> Ended {
        let _ = self.process.ended().await;
        // Killed with its parent.
        let _ = self.vmm.ended().await;
        read_end(&self.dir)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.kill();
        if let Some(mut child) = self.child.take() {
            // It was sent SIGKILL, or has ended.
            let _ = child.wait();
        }
    }
}

/// A child that is killed unless it is taken.
struct Ending(Option<Child>);

impl Ending {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn read_end(dir: &Path) -> Ended {
    fs::read(dir.join(EXIT_FILE))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

fn spawn(program: &Path, job: &Path, fds: Vec<(OwnedFd, i32)>, log: fs::File) -> io::Result<Child> {
    let mappings = fds
        .into_iter()
        .map(|(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        })
        .collect();
    Command::new(program)
        .arg(job)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .fd_mappings(mappings)
        .map_err(io::Error::other)?
        .spawn()
}
