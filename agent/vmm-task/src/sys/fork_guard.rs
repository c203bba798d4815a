//! Tells the agent from its forked children.
//!
//! libcontainer clones this process and goes on in the child until it executes the
//! container's program. If code in such a child panicked and unwound into the agent's own
//! `catch_unwind`, a second agent would run, with the first one's connections. Pids
//! cannot tell them apart (both may be 1, in different namespaces); a page which the
//! kernel zeroes in every child can.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

static MARK: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Marks this process as the agent.
pub fn install() -> io::Result<()> {
    let flags = MapFlags::MAP_PRIVATE;
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let page = unsafe { mmap_anonymous(None, PAGE, rw, flags) }?;
    // SAFETY: `page` is the mapping made above, of this length.
    Errno::result(unsafe { libc::madvise(page.as_ptr(), PAGE.get(), libc::MADV_WIPEONFORK) })?;
    let mark: *mut AtomicU8 = page.as_ptr().cast();
    // SAFETY: the page is mapped, writable, zeroed (a valid AtomicU8) and never unmapped.
    unsafe { &*mark }.store(1, Ordering::Relaxed);
    MARK.store(mark, Ordering::Relaxed);
    Ok(())
}

/// Whether this is a forked child of the agent that has not executed a program yet.
pub fn is_child() -> bool {
    let mark = MARK.load(Ordering::Relaxed);
    if mark.is_null() {
        return false;
    }
    // SAFETY: set by `install` to a page that stays mapped, also in children.
    unsafe { &*mark }.load(Ordering::Relaxed) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fork_is_a_child() {
        install().unwrap();
        assert!(!is_child());
        // SAFETY: the child only reads memory and leaves.
        match unsafe { libc::fork() } {
            0 => crate::sys::exit_child(if is_child() { 42 } else { 0 }),
            pid => {
                let mut status = 0;
                // SAFETY: `status` outlives the call.
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                assert_eq!(libc::WEXITSTATUS(status), 42);
            }
        }
    }
}
