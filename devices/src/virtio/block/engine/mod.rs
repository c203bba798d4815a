//! Running operations.

pub(super) mod sync;
pub(super) mod uring;

use std::fmt;

/// How requests should be run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where the kernel lets us, system calls otherwise.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// System calls on one thread per queue.
    Sync,
}

/// How requests are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring, on the VM's event loop.
    Uring,
    /// System calls on one thread per queue.
    Sync {
        /// Why not io_uring.
        reason: String,
    },
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uring => f.write_str("io_uring"),
            Self::Sync { reason } => write!(f, "sync ({reason})"),
        }
    }
}
