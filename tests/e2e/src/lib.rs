//! End-to-end tests on real parts: the built daemon and CLI, a real Linux guest on the real
//! /dev/kvm. Each test boots as few VMs as it needs, since a boot takes seconds on hosts that
//! emulate guest ring 0, and closes by counting what its pods left behind.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "what is here reports by panicking"
)]

pub mod node;

use std::path::{Path, PathBuf};

use harness::ctl::Ctl;
use harness::daemon::Daemon;
use harness::leftovers::Held;

/// A daemon, a CLI on it and a folder with a busybox root file system.
#[derive(Debug)]
pub struct World {
    /// CLI that talks to the daemon.
    pub ctl: Ctl,
    /// Root file system for containers.
    pub rootfs: PathBuf,
    /// What the daemon held before the first pod.
    pub before: Held,
    // Dropped last: the daemon's folder may hold mounts of the pods.
    /// The daemon.
    pub daemon: Daemon,
    scratch: tempfile::TempDir,
}

impl World {
    /// Starts a daemon with the default configuration.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn new() -> Self {
        Self::with_config("")
    }

    /// Starts a daemon with `config` as its TOML file. Unless that says otherwise no VMs are
    /// made ahead of time: what the daemon holds would depend on when one looks.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn with_config(config: &str) -> Self {
        let scratch = tempfile::Builder::new().prefix("kuasar-world-").tempdir();
        let scratch = scratch.expect("temporary folder");
        let rootfs = harness::rootfs::busybox(scratch.path());
        let mut config = config.to_owned();
        if !config.contains("[templates]") {
            config.push_str("\n[templates]\nwarm = 0\nshells = 0\n");
        }
        let daemon = Daemon::start(&config);
        let ctl = Ctl::new(&daemon);
        let before = Held::by(&daemon);
        Self {
            ctl,
            rootfs,
            before,
            daemon,
            scratch,
        }
    }

    /// A folder of the test's own.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Fails the test unless the daemon holds what it held before the first pod.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.before.assert_back(&self.daemon);
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
