//! File system device: virtio 1.2, section 5.11.
//!
//! A share is a directory tree of the host, served inside this process. The codec of the
//! FUSE protocol and the transport over descriptor chains are `fuse-backend-rs`; what is
//! behind them is [`share`]. The passthrough file system of that crate was tried and does
//! not fit a process that serves many guests: it keeps a record of every file a guest has
//! ever seen (or, in its other mode, fails after 254 mounts), sets the umask of the whole
//! process, follows `..`, allocates as much as a request asks for, and leaks descriptors
//! to child processes.
//!
//! Rules of a share:
//! * **Nothing outside is reachable.** Names are single components, `.` and `..` are
//!   refused, symlinks are returned to the guest and never followed here. Only regular
//!   files and directories are ever opened for I/O, so that no device node, FIFO or
//!   `/proc` link can be.
//! * **Mounts made on the host below the root show up**, also after the VM has started, as
//!   directories and files of their own: files are known by mount, device and inode number.
//!   The guest holds them open while it remembers them, so unmount them with `MNT_DETACH`.
//! * **Files belong to who made them**: the worker takes on the guest's uid and gid while
//!   it creates something. Permissions are checked by the guest kernel, which always
//!   mounts virtio-fs with `default_permissions`.
//! * **A guest is bounded**: request sizes, files it may remember, files it may have open.
//!   Limits are errors to the guest (ENFILE), never to this process.
//! * Work that can block happens on the device's own threads, never on the event loop.
//!   Each has its own umask and group list.
//! * With [`FsConfig::dax_bytes`] a file's attributes tell the guest to map it instead of
//!   copying it, by `FUSE_ATTR_DAX` (the mount option `dax=inode`, which is Linux' default).
//! * Locks (`flock`, `fcntl`) are kept by the guest kernel: they hold among the containers
//!   of a pod, not against the host.
//!
//! | file | idea |
//! |---|---|
//! | `config`, `tag` | what is shared and how; config space (5.11.4) |
//! | `request` | a chain becomes a request that the guest can no longer change |
//! | `worker`, `thread` | threads, their queues, their identity |
//! | `operations`, `share` | the operations of FUSE, and what they have in common |
//! | `inodes`, `handles` | what the guest remembers, what it has open |
//! | `attributes`, `names`, `listing`, `xattr` | parts of the operations |
//! | `identity` | acting as a user of the guest |
//! | `window` | files as memory of the guest (DAX) |
//! | `device` | [`Fs`]: activation, reset |
//! | `state`, `session` | what a snapshot keeps: files by path below the root |

mod attributes;
mod config;
mod device;
mod handles;
mod identity;
mod inodes;
mod listing;
mod names;
mod operations;
mod request;
mod session;
mod share;
mod state;
mod tag;
mod thread;
mod window;
mod worker;
mod xattr;

#[cfg(test)]
mod tests;

pub use config::{CachePolicy, FsConfig, FsError, ShareRoot};
pub use device::{Fs, FsHandle};
pub use window::BLOCK_BYTES as DAX_BLOCK_BYTES;
