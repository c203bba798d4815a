//! A daemon of the test's own, `vmm-sandboxer` or another.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{eventually, program};

/// How long the daemon may take to say READY, and to end.
const LIMIT: Duration = Duration::from_secs(60);

/// A running daemon in a temporary folder; ended and removed on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    program: &'static str,
    dir: TempDir,
}

impl Daemon {
    /// Starts `vmm-sandboxer` with `config` as its TOML file and waits until it says READY.
    ///
    /// # Panics
    /// When it does not become ready; the message holds its log.
    #[must_use]
    pub fn start(config: &str) -> Self {
        Self::start_program("vmm-sandboxer", config)
    }

    /// As [`Daemon::start`], for the daemon `program`.
    ///
    /// # Panics
    /// As for [`Daemon::start`].
    #[must_use]
    pub fn start_program(program: &'static str, config: &str) -> Self {
        // A short name: sockets of pods with containerd's ids lie below, and the kernel takes
        // 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("kuasar-")
            .tempdir()
            .expect("temporary dir");
        let config_path = dir.path().join("config.toml");
        std::fs::write(&config_path, config).expect("write the daemon's config");
        let child = launch(program, dir.path());
        Self {
            child,
            program,
            dir,
        }
    }

    /// Starts the next daemon on the same folder and socket, once this one has ended.
    ///
    /// # Panics
    /// When that does not become ready; the message holds its log.
    pub fn start_again(&mut self) {
        let _ = self.child.wait();
        self.child = launch(self.program, self.dir.path());
    }

    /// Ends the daemon with SIGKILL and starts the next one on the same folder and socket.
    ///
    /// # Panics
    /// When that does not become ready; the message holds its log.
    pub fn kill_and_restart(&mut self) {
        let _ = self.child.kill();
        self.start_again();
    }

    /// Process id of the daemon.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The daemon's Controller socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("sandboxer.sock")
    }

    /// The daemon's state folder.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The folder that holds everything of this daemon.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the daemon has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// Whether the daemon's process is alive.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends the daemon as a crash would.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().expect("wait for the daemon");
    }

    /// Ends the external VMs of its pods, which outlive it.
    pub fn end_vms(&self) {
        end_vms(&self.state_dir());
    }

    /// Asks the daemon to end and returns its exit status.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn terminate(&mut self) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        eventually("the daemon's end", LIMIT, || {
            self.child.try_wait().expect("wait for the daemon")
        })
    }
}

/// Starts the daemon of `dir` and waits until it says READY.
fn launch(name: &str, dir: &Path) -> Child {
    let notify_path = dir.join("notify");
    let _ = std::fs::remove_file(&notify_path);
    let notify = UnixDatagram::bind(&notify_path).expect("bind the notify socket");
    notify
        .set_read_timeout(Some(LIMIT))
        .expect("set a deadline");
    let log_path = dir.join("daemon.log");
    let log = File::options()
        .create(true)
        .append(true)
        .open(&log_path)
        .expect("create the daemon's log");
    let mut child = program(name)
        .arg("--listen")
        .arg(dir.join("sandboxer.sock"))
        .arg("--dir")
        .arg(dir.join("state"))
        .arg("--config")
        .arg(dir.join("config.toml"))
        .env("NOTIFY_SOCKET", &notify_path)
        .stderr(log)
        .spawn()
        .expect("start the daemon (was it built?)");
    let mut message = [0; 4096];
    match notify.recv(&mut message) {
        Ok(n) if String::from_utf8_lossy(&message[..n]).contains("READY=1") => child,
        other => {
            let _ = child.kill();
            let _ = child.wait();
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            panic!("the daemon did not say READY: {other:?}\n{log}");
        }
    }
}

/// Ends the external VMs of pods that a failed test left: they outlive their daemon.
fn end_vms(state: &Path) {
    for entry in std::fs::read_dir(state).into_iter().flatten().flatten() {
        for (file, name) in [
            ("vmm.json", "vmm"),
            ("vmm.json", "supervisor"),
            ("quark.json", "process"),
        ] {
            let text = std::fs::read(entry.path().join(file)).unwrap_or_default();
            let processes: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            let pid = processes[name]["pid"].as_i64();
            if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// Unmounts everything below `dir`, what was mounted last first.
fn detach_below(dir: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(dir) && point != dir)
        .collect();
    for point in points.iter().rev() {
        let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() && !std::thread::panicking() {
            self.terminate();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        end_vms(&self.state_dir());
        // A daemon that was killed leaves its mounts, and removing the folder would go through
        // them into what is shared with its pods.
        detach_below(self.dir.path());
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}", self.log());
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;

    #[test]
    fn what_is_mounted_below_is_detached_and_not_removed() {
        let (dir, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(shared.path().join("kept"), "").unwrap();
        let point = dir.path().join("point");
        std::fs::create_dir(&point).unwrap();
        let bound = mount(
            Some(shared.path()),
            &point,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        );
        if let Err(e) = bound {
            println!("skipped: cannot mount: {e}");
            return;
        }
        detach_below(dir.path());
        assert!(!point.join("kept").exists());
        drop(dir);
        assert!(shared.path().join("kept").exists());
    }
}
