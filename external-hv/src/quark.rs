//! Quark, started by its launcher.
//!
//! `quark sandbox` makes one process for a pod, writes its pid to a file and ends. That process
//! serves containerd's Task API on a socket which was bound before; its root is the folder given
//! with `-r`. What the launcher mounts stays in a mount namespace of its own.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::hypervisor::HvError;
use crate::process::{Process, ProcessId};
use crate::supervisor::{STDERR_BYTES, replace};

/// Name of this hypervisor.
pub const NAME: &str = "quark";
/// The sandbox's process, in the pod's folder: what a later daemon needs.
const RECORD: &str = "quark.json";
const VERSION: u32 = 1;
/// What the launcher and the sandbox write to stderr, in the pod's folder.
const LOG: &str = "quark.log";

/// What a launcher is told.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The launcher.
    pub program: PathBuf,
    /// Id of the pod.
    pub id: String,
    /// The pod's folder, of mode 0700.
    pub dir: PathBuf,
    /// Root of the sandbox, with its `config.json`.
    pub root: PathBuf,
    /// How long the launcher may take.
    pub limit: Duration,
}

/// A running sandbox. Dropping it ends nothing: it may outlive its daemon.
#[derive(Debug)]
pub struct Sandbox(Process);

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    process: ProcessId,
}

/// Where the sandbox of a pod's folder serves the Task API.
#[must_use]
pub fn task_socket(dir: &Path) -> PathBuf {
    dir.join("quark-task.sock")
}

/// The newest of what the sandbox of a pod's folder and its launcher wrote to stderr.
#[must_use]
pub fn log_tail(dir: &Path) -> Option<String> {
    let most = u64::try_from(STDERR_BYTES).unwrap_or(u64::MAX);
    let mut file = File::open(dir.join(LOG)).ok()?;
    let bytes = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(most)))
        .ok()?;
    let mut tail = Vec::new();
    file.take(most).read_to_end(&mut tail).ok()?;
    Some(String::from_utf8_lossy(&tail).trim().to_owned())
}

impl Sandbox {
    /// Runs the launcher to its end.
    ///
    /// # Errors
    /// It cannot be run, does not end in time, fails, or leaves no process. All that it started
    /// is ended then.
    pub async fn launch(launch: Launch) -> Result<Self, HvError> {
        let started = launch.clone();
        let launcher = tokio::task::spawn_blocking(move || started.spawn())
            .await
            .map_err(io::Error::other)
            .and_then(|spawned| spawned)
            .map_err(|err| launch.failed(format!("cannot be run: {err}")))?;
        let launcher = Launcher(Some(launcher), launch.pid_file());
        let process = ProcessId::of(launcher.id()).and_then(ProcessId::open);
        let process = process.map_err(|err| launch.failed(err))?;
        if let Some(process) = process {
            let ended = timeout(launch.limit, process.ended()).await;
            ended
                .map_err(|_| HvError::Silent {
                    vmm: NAME,
                    what: "start a sandbox",
                    limit: launch.limit,
                })?
                .map_err(|err| launch.failed(err))?;
        }
        // Not reaped yet: until then its process group is nobody else's.
        let id = Id::Pid(launcher.pid());
        match waitid(id, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, 0)) => {}
            Ok(WaitStatus::Exited(_, code)) => {
                return Err(launch.failed(format!("exit status {code}")));
            }
            Ok(status) => return Err(launch.failed(format!("{status:?}"))),
            Err(err) => return Err(launch.failed(err)),
        }
        let sandbox = launch.sandbox()?;
        launcher.done();
        Ok(sandbox)
    }

    /// The sandbox that an earlier daemon started; `None` when there is none that runs.
    ///
    /// # Errors
    /// The record cannot be read, is of another version, or the process cannot be opened.
    pub fn find(dir: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read(dir.join(RECORD)) {
            Ok(text) => text,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(err),
        };
        let record: Record = serde_json::from_slice(&text)?;
        if record.version != VERSION {
            let why = format!("{RECORD} has version {}", record.version);
            return Err(io::Error::new(ErrorKind::Unsupported, why));
        }
        Ok(record.process.open()?.map(Self))
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.0
    }
}

impl Launch {
    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// With what was written to stderr.
    fn failed(&self, how: impl Display) -> HvError {
        let said = log_tail(&self.dir).unwrap_or_default();
        let how = match said.as_str() {
            "" => how.to_string(),
            said => format!("{how}: {said}"),
        };
        HvError::EarlyExit { vmm: NAME, how }
    }

    /// Starts the launcher in a mount namespace of its own, which sees what is mounted on the
    /// host later. Blocks.
    fn spawn(self) -> io::Result<Child> {
        let log = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.dir.join(LOG))?;
        let mut command = Command::new(&self.program);
        command
            .arg("-r")
            .arg(&self.root)
            .arg("sandbox")
            .arg("--task-socket")
            .arg(task_socket(&self.dir))
            .arg("--id")
            .arg(&self.id)
            .arg("--pid-file")
            .arg(self.pid_file())
            .current_dir(&self.root)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // The namespace of a thread is that of the processes it starts.
        let thread = std::thread::Builder::new().name("quark-launch".to_owned());
        let spawning = thread.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
            mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)?;
            command.spawn()
        })?;
        spawning
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that starts it panicked")))
    }

    /// What a launcher that succeeded has made.
    fn sandbox(&self) -> Result<Sandbox, HvError> {
        let protocol = |why: String| HvError::Protocol { vmm: NAME, why };
        let pid = read_pid(&self.pid_file()).map_err(|err| {
            protocol(format!("its pid file {}: {err}", self.pid_file().display()))
        })?;
        let process = ProcessId::of(pid).ok().map(ProcessId::open);
        let Some(Ok(Some(process))) = process else {
            return Err(self.failed(format!("its sandbox, process {pid}, has ended")));
        };
        let record = Record {
            version: VERSION,
            process: process.id(),
        };
        let text = serde_json::to_vec_pretty(&record).map_err(io::Error::from);
        if let Err(err) = text.and_then(|text| replace(&self.dir.join(RECORD), &text)) {
            process.kill();
            return Err(self.failed(format!("cannot be recorded: {err}")));
        }
        Ok(Sandbox(process))
    }
}

fn read_pid(path: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(path)?;
    let pid = text.trim().parse().ok();
    // Neither nobody nor init nor ourselves: it is sent SIGKILL one day.
    pid.filter(|&pid| pid > 1 && pid != std::process::id())
        .ok_or_else(|| io::Error::other(format!("{text:?} is no process id")))
}

/// A launcher that may have to be ended, and its pid file.
struct Launcher(Option<Child>, PathBuf);

impl Launcher {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.id().cast_signed())
    }

    /// It has ended, and what it started is to stay.
    fn done(mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.wait();
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let pid = self.pid();
        let Some(child) = &mut self.0 else {
            return;
        };
        // The sandbox may have left the group by now.
        if let Ok(Ok(Some(sandbox))) =
            read_pid(&self.1).map(|pid| ProcessId::of(pid).and_then(ProcessId::open))
        {
            sandbox.kill();
        }
        let _ = killpg(pid, Signal::SIGKILL);
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tokio::io::AsyncReadExt;

    use super::*;

    /// A launcher that is a shell script.
    fn launcher(dir: &Path, script: &str) -> Launch {
        let program = dir.join("quark");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let root = dir.join("sandbox");
        fs::create_dir(&root).unwrap();
        Launch {
            program,
            id: "p1".to_owned(),
            dir: dir.to_owned(),
            root,
            limit: Duration::from_secs(20),
        }
    }

    /// Whether this process may unshare its mount namespace.
    fn may_not() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("skipped: a mount namespace needs root");
        }
        !root
    }

    #[tokio::test]
    async fn the_launcher_is_told_the_contract_and_its_mounts_stay_inside() {
        if may_not() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let script = "printf '%s\\n' \"$PWD\" \"$@\" > ../args; mount -t tmpfs none . || exit 1
            sleep 1000 & printf %s $! > \"$9\"";
        let launch = launcher(dir.path(), script);
        let sandbox = Sandbox::launch(launch.clone()).await.unwrap();
        let told = fs::read_to_string(dir.path().join("args")).unwrap();
        let base = dir.path().display();
        let expected = format!(
            "{base}/sandbox\n-r\n{base}/sandbox\nsandbox\n--task-socket\n{base}/quark-task.sock\n\
             --id\np1\n--pid-file\n{base}/pid\n"
        );
        assert_eq!(told, expected);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*base.to_string()), "{mounts}");
        let found = Sandbox::find(dir.path()).unwrap().unwrap();
        assert_eq!(found.process().id(), sandbox.process().id());
        sandbox.process().kill();
        timeout(launch.limit, found.process().ended())
            .await
            .unwrap()
            .unwrap();
        assert!(Sandbox::find(dir.path()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_launcher_that_fails_is_quoted() {
        if may_not() {
            return;
        }
        for (script, says) in [
            (
                "echo no such device >&2; exit 3",
                "exit status 3: no such device",
            ),
            ("kill -9 $$", "SIGKILL"),
            ("exit 0", "pid file"),
            ("printf nonsense > \"$9\"", "\"nonsense\" is no process id"),
            ("printf 1 > \"$9\"", "\"1\" is no process id"),
            ("sh -c 'exit 0' & wait; printf %s $! > \"$9\"", "has ended"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let error = Sandbox::launch(launcher(dir.path(), script)).await;
            let error = error.unwrap_err().to_string();
            assert!(error.contains(says), "{script}: {error}");
            assert!(Sandbox::find(dir.path()).unwrap().is_none());
        }
        let dir = tempfile::tempdir().unwrap();
        let mut launch = launcher(dir.path(), "");
        launch.program = dir.path().join("none");
        let error = Sandbox::launch(launch).await.unwrap_err().to_string();
        assert!(error.contains("cannot be run: No such file"), "{error}");
    }

    #[tokio::test]
    async fn a_launcher_that_hangs_is_ended_with_what_it_started() {
        if may_not() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("alive");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut alive = tokio::net::unix::pipe::OpenOptions::new()
            .open_receiver(&fifo)
            .unwrap();
        let mut launch = launcher(dir.path(), "exec >../alive; echo here; sleep 1000 & wait");
        launch.limit = Duration::from_secs(1);
        let error = Sandbox::launch(launch).await.unwrap_err().to_string();
        assert!(error.contains("did not start a sandbox within"), "{error}");
        // At its end nobody has it open any more.
        let mut said = String::new();
        let ended = alive.read_to_string(&mut said);
        timeout(Duration::from_secs(20), ended)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(said, "here\n");
    }
}
