//! What a worker thread changes about itself. All of it is per thread in Linux, and none
//! of it may reach other threads of the process: files of other pods depend on them.

use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use rustix::thread::set_thread_groups;

/// Prepares the calling thread to act for guest users.
///
/// # Errors
/// When the kernel refuses to give the thread a umask of its own.
pub fn prepare() -> io::Result<()> {
    // A umask of its own: the guest applies the one of its process, and the host's must
    // not be applied on top. unshare(CLONE_FS) parts cwd, root and umask from the others.
    unshare(CloneFlags::CLONE_FS)?;
    umask(Mode::empty());
    // Requests run with the guest's uid and gid; the daemon's own groups must not help.
    // Without privilege there are no other users to act for, and nothing to drop.
    if nix::unistd::geteuid().is_root() {
        set_thread_groups(&[])?;
    }
    Ok(())
}
