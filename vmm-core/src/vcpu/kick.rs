//! Getting a vCPU thread out of the guest.
//!
//! Two steps that together cannot be missed: the flag `immediate_exit` in the vCPU's
//! `kvm_run` page makes the next `KVM_RUN` return at once, and a signal ends the one in
//! progress. The signal's handler does nothing, it only has to exist; with that of SIGSYS it is
//! all that this crate installs process-wide, once.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::{io, mem};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// Offset from SIGRTMIN of the signal that kicks vCPUs. The first few are popular.
const KICK_OFFSET: c_int = 7;

fn kick_signal() -> c_int {
    SIGRTMIN().saturating_add(KICK_OFFSET)
}

extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Makes the kick signal harmless in this process.
pub(super) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), ignore).map_err(|err| err.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Lets the calling thread be kicked, whatever mask it inherited.
pub(super) fn accept_kicks() -> io::Result<()> {
    unblock_signal(kick_signal()).map_err(|err| io::Error::other(format!("{err:?}")))
}

/// Interrupts `thread` if it is in a system call.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // ESRCH: the thread has ended, which is what was wanted.
    let _ = thread.kill(kick_signal());
}

/// The flag `immediate_exit` of one vCPU, in a mapping of its own.
#[derive(Debug)]
pub(super) struct ImmediateExit {
    page: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the mapping is owned, lives until drop, and is only accessed through an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`, whose `kvm_run` area has `run_bytes`.
    pub(super) fn of(vcpu: &VcpuFd, run_bytes: usize) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(run_bytes)
            .filter(|bytes| bytes.get() >= mem::size_of::<kvm_run>())
            .ok_or_else(|| io::Error::other("KVM reports no kvm_run area"))?;
        // SAFETY: the fd is open for as long as `vcpu` is borrowed, which outlasts this use.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new shared mapping at an address of the kernel's choice: nothing else
        // is replaced, and the mapping keeps the vCPU's file open.
        let page = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )?
        };
        Ok(Self {
            page,
            bytes: bytes.get(),
        })
    }

    pub(super) fn set(&self, on: bool) {
        let flag = mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte lies in the mapping, which is at least `kvm_run` long and is
        // unmapped only on drop; every access to it in this process is by a whole byte.
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(flag)) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: mapped in `of` with this length, and nobody can use it after drop.
        let _ = unsafe { munmap(self.page, self.bytes) };
    }
}
