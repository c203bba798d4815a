//! What a share is and how it is served.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::tag::Tag;

/// Where a share begins.
#[derive(Debug)]
pub enum ShareRoot {
    /// A directory, opened when the device is made.
    Path(PathBuf),
    /// An open directory; `O_PATH` is enough.
    Fd(OwnedFd),
}

impl fmt::Display for ShareRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(_) => f.write_str("(an open directory)"),
        }
    }
}

impl From<PathBuf> for ShareRoot {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<OwnedFd> for ShareRoot {
    fn from(fd: OwnedFd) -> Self {
        Self::Fd(fd)
    }
}

/// How much of the share the guest may keep in its own caches, and for how long changes
/// made on the host may stay unseen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nothing: every access asks the host. Shared mappings do not work then.
    Never,
    /// Names and attributes for a second; file contents until their modification time or
    /// size changes. A file replaced or rewritten on the host (a projected volume that
    /// swaps its symlink, `/etc/resolv.conf`) is seen within that second.
    #[default]
    Auto,
    /// Everything, for a day: only for shares that nobody but the guest changes.
    Always,
}

impl CachePolicy {
    /// How long names and attributes are valid.
    #[must_use]
    pub fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// How to make an [`super::Fs`].
#[derive(Debug)]
pub struct FsConfig {
    /// What the guest mounts: 1 to 36 bytes, no NUL.
    pub tag: String,
    /// The directory that is shared.
    pub root: ShareRoot,
    /// Request queues beside the high-priority one, 1 to 16.
    pub request_queues: u16,
    /// Threads that serve all queues, 1 to 64: so many requests may block at a time.
    pub workers: u16,
    /// See [`CachePolicy`].
    pub cache: CachePolicy,
    /// Refuse whatever changes the share.
    pub read_only: bool,
    /// Let the guest collect small writes. Only for shares that nobody else writes to.
    pub writeback: bool,
    /// Serve extended attributes.
    pub xattr: bool,
    /// Let the guest make block and character devices; whiteouts (0:0) are always allowed.
    pub device_nodes: bool,
    /// Bytes of address space through which the guest reaches the files themselves, whole
    /// blocks of [`super::DAX_BLOCK_BYTES`]; zero for none. What of a file its owner cuts off
    /// on the host while the guest uses it ends the guest's machine.
    pub dax_bytes: u64,
    /// Files and directories the guest may know at a time; each costs an fd of this
    /// process. More are refused with ENFILE.
    pub max_inodes: usize,
    /// Files and directories the guest may have open at a time, likewise.
    pub max_handles: usize,
}

impl FsConfig {
    /// A writable share of `root` with the defaults.
    #[must_use]
    pub fn new(tag: impl Into<String>, root: impl Into<ShareRoot>) -> Self {
        Self {
            tag: tag.into(),
            root: root.into(),
            request_queues: 1,
            workers: 2,
            cache: CachePolicy::default(),
            read_only: false,
            writeback: false,
            xattr: true,
            device_nodes: false,
            dax_bytes: 0,
            max_inodes: 256 * 1024,
            max_handles: 64 * 1024,
        }
    }
}

/// Why a share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit its field.
    #[error("tag {0:?} must have 1 to {max} bytes and no NUL", max = Tag::MAX)]
    Tag(String),
    /// A number is out of range.
    #[error("{field} is {value}, it must be 1 to {max}")]
    OutOfRange {
        /// Name of the field in [`FsConfig`].
        field: &'static str,
        /// What it was set to.
        value: usize,
        /// The largest it can be.
        max: usize,
    },
    /// The window cannot be.
    #[error(
        "dax_bytes is {bytes}, it must be a multiple of {}",
        super::DAX_BLOCK_BYTES
    )]
    Dax {
        /// As configured.
        bytes: u64,
    },
    /// There is no address space for the window.
    #[error("cannot reserve dax_bytes = {bytes}; use less")]
    NoDax {
        /// As configured.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The shared directory cannot be opened.
    #[error("cannot open the shared directory {root}")]
    Root {
        /// Which.
        root: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}
