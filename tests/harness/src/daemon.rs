//! A `vmm-sandboxer` of the test's own.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{bin_dir, eventually};

/// How long the daemon may take to say READY, and to end.
const LIMIT: Duration = Duration::from_secs(60);

/// A running daemon in a temporary folder; ended and removed on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    /// Starts the daemon with `config` as its TOML file and waits until it says READY.
    ///
    /// # Panics
    /// When it does not become ready; the message holds its log.
    #[must_use]
    pub fn start(config: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kuasar-e2e-")
            .tempdir()
            .expect("temporary dir");
        let config_path = dir.path().join("config.toml");
        std::fs::write(&config_path, config).expect("write the daemon's config");
        Self::start_in(dir)
    }

    /// Starts another daemon in the place of `ended`, with its configuration and socket.
    ///
    /// # Panics
    /// As for [`Daemon::start`].
    #[must_use]
    pub fn restart(ended: &mut Self) -> Self {
        let empty = tempfile::tempdir().expect("temporary dir");
        Self::start_in(std::mem::replace(&mut ended.dir, empty))
    }

    fn start_in(dir: TempDir) -> Self {
        let config_path = dir.path().join("config.toml");
        let notify_path = dir.path().join("notify");
        // An earlier daemon's.
        let _ = std::fs::remove_file(&notify_path);
        let notify = UnixDatagram::bind(&notify_path).expect("bind the notify socket");
        notify
            .set_read_timeout(Some(LIMIT))
            .expect("set a deadline");
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.path().join("daemon.log"))
            .expect("open the daemon's log");
        let child = Command::new(bin_dir().join("vmm-sandboxer"))
            .arg("--listen")
            .arg(dir.path().join("sandboxer.sock"))
            .arg("--dir")
            .arg(dir.path().join("state"))
            .arg("--config")
            .arg(&config_path)
            .env("NOTIFY_SOCKET", &notify_path)
            .stderr(log)
            .spawn()
            .expect("start vmm-sandboxer (was it built?)");
        let daemon = Self { child, dir };
        let mut message = [0; 4096];
        match notify.recv(&mut message) {
            Ok(n) if String::from_utf8_lossy(&message[..n]).contains("READY=1") => {}
            other => panic!("the daemon did not say READY: {other:?}\n{}", daemon.log()),
        }
        daemon
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

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() && !std::thread::panicking() {
            self.terminate();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}", self.log());
        }
    }
}
