//! The process beside each VMM.
//!
//! It serves our devices to the VMM over vhost-user, keeps the console bounded, and is the
//! VMM's parent: it knows how the VMM ended, also when the daemon was away. The VMM dies with
//! it, whatever it dies of. The daemon starts it with a [`Job`] and hears through a pipe when
//! the VMM runs; from then on neither needs the other.
//!
//! A process per VM, rather than threads of the daemon, because a VMM can shrink the memory
//! that it shares with a device, and then whoever touches that memory is killed (SIGBUS); and
//! because virtio-fs cannot be handed over to a restarted daemon.

mod bridge;
mod launch;
mod run;

use std::path::PathBuf;

use devices::virtio::fs::CachePolicy;
use serde::{Deserialize, Serialize};

pub use self::launch::Supervisor;
pub(crate) use self::run::replace;
pub use self::run::run;

use crate::process::ProcessId;

/// Name of the program.
pub const PROGRAM: &str = "kuasar-vmm-supervisor";
/// Through which the supervisor says that the VMM runs.
pub(crate) const READY_FD: i32 = 3;
/// Held by the daemon; at its end the VM ends, too.
pub(crate) const LIFELINE_FD: i32 = 4;
/// The first that the VMM may inherit.
pub const FIRST_FREE_FD: i32 = 5;
/// How the VMM ended, in the VM's folder.
pub(crate) const EXIT_FILE: &str = "vmm-exit.json";
/// Most bytes of the VMM's stderr that are kept.
pub(crate) const STDERR_BYTES: usize = 4096;

/// A Unix socket that the VMM inherits bound and listening: whoever connects to it need not
/// wait for the VMM to be ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// Its file.
    pub path: PathBuf,
    /// Number of the fd in the VMM.
    pub fd: i32,
}

/// What a supervisor is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    /// Fds to pass on, under their numbers.
    pub(crate) fds: Vec<i32>,
    pub(crate) listens: Vec<Listen>,
    pub(crate) lifeline: bool,
    pub(crate) dir: PathBuf,
    pub(crate) console: PathBuf,
    pub(crate) console_cap_bytes: u64,
    pub(crate) share: Option<ShareJob>,
    pub(crate) vsock: Option<VsockJob>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShareJob {
    pub(crate) socket: PathBuf,
    pub(crate) tag: String,
    pub(crate) root: PathBuf,
    pub(crate) workers: u16,
    pub(crate) cache: Cache,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cache {
    Never,
    Auto,
    Always,
}

impl From<CachePolicy> for Cache {
    fn from(policy: CachePolicy) -> Self {
        match policy {
            CachePolicy::Never => Self::Never,
            CachePolicy::Auto => Self::Auto,
            CachePolicy::Always => Self::Always,
        }
    }
}

impl From<Cache> for CachePolicy {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Never => Self::Never,
            Cache::Auto => Self::Auto,
            Cache::Always => Self::Always,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum VsockJob {
    /// Our device at `socket`.
    Device {
        socket: PathBuf,
        uds: PathBuf,
        guest_cid: u32,
    },
    /// The host kernel's: [`bridge`].
    Kernel {
        uds: PathBuf,
        guest_cid: u32,
        control_port: u32,
    },
}

/// What a supervisor says once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ready {
    /// The VMM runs.
    Running(ProcessId),
    /// It does not.
    Failed(String),
}

/// How a VMM ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    /// What of ours failed, if that was why.
    pub(crate) failure: Option<String>,
    /// The end of what it wrote to stderr.
    pub(crate) stderr: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(failure) = &self.failure {
            return f.write_str(failure);
        }
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit status {code}")?,
            (None, Some(signal)) => write!(f, "killed by signal {signal}")?,
            (None, None) => f.write_str("killed with its supervisor")?,
        }
        let stderr = self.stderr.trim();
        if !stderr.is_empty() {
            write!(f, ": {stderr}")?;
        }
        Ok(())
    }
}
