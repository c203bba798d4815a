//! System calls that no thread of a machine has a reason to make.
//!
//! Every thread of a machine runs behind one filter. What a device or a vCPU thread may need
//! depends on the device, the allocator and the C library, so the filter names what none of
//! them does: to run programs, mount, change namespaces, load kernel code, trace, set clocks,
//! signal or inspect processes, open network sockets. Such a call returns `EPERM` and ends its
//! machine, and nothing but it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use devices::virtio::{EventHandler, Interest, Loop, Ready};
use libc::{c_int, c_long, c_void, siginfo_t, ucontext_t};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

use crate::exit::ExitNotice;
use crate::vm::ExitReason;

/// Forbidden whatever the arguments.
const FORBIDDEN: &[c_long] = &[
    // Programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_personality,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // What belongs to the whole host.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// The filter as the kernel takes it.
fn program() -> io::Result<&'static BpfProgram> {
    static PROGRAM: OnceLock<Result<BpfProgram, String>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| build().map_err(|err| err.to_string()))
        .as_ref()
        .map_err(|err| io::Error::other(err.clone()))
}

fn build() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = FORBIDDEN
        .iter()
        .map(|number| (*number, Vec::new()))
        .collect();
    let unless = |argument, value: c_int| {
        let value = u64::try_from(value).unwrap_or(0);
        let length = SeccompCmpArgLen::Dword;
        SeccompCondition::new(argument, length, SeccompCmpOp::Ne, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    // A thread of the file system has its own working directory and umask.
    rules.insert(libc::SYS_unshare, vec![unless(0, libc::CLONE_FS)?]);
    rules.insert(libc::SYS_socket, vec![unless(0, libc::AF_UNIX)?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Trap,
        TargetArch::x86_64,
    )?;
    filter.try_into()
}

/// Where the threads of one machine are told on.
#[derive(Debug)]
pub(crate) struct Violations {
    event: EventFd,
    /// The first forbidden call; negative: none yet.
    call: AtomicI32,
}

thread_local! {
    /// Those of the thread's machine. Without a destructor and set before the filter, so a
    /// signal handler can read it at any time.
    static MINE: Cell<*const Violations> = const { Cell::new(std::ptr::null()) };
}

impl Violations {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        install_handler()?;
        Ok(Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            call: AtomicI32::new(-1),
        }))
    }

    /// Runs `work` on this thread, which ends afterwards, behind the filter.
    pub(crate) fn confine(self: &Arc<Self>, work: impl FnOnce()) -> io::Result<()> {
        MINE.with(|mine| mine.set(Arc::as_ptr(self)));
        seccompiler::apply_filter(program()?).map_err(io::Error::other)?;
        work();
        Ok(())
    }

    fn taken(&self) -> Option<i32> {
        let _ = self.event.read();
        Some(self.call.load(Ordering::Acquire)).filter(|call| *call >= 0)
    }
}

/// Ends a machine whose threads were told on; runs on its event loop.
pub(crate) struct Watcher {
    pub(crate) violations: Arc<Violations>,
    pub(crate) exit: ExitNotice,
}

impl EventHandler for Watcher {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        let interest = Interest {
            readable: true,
            writable: false,
        };
        lp.watch(self.violations.event.as_raw_fd(), 0, interest)
    }

    fn ready(&mut self, _: &mut dyn Loop, _: u64, _: Ready) {
        if let Some(call) = self.violations.taken() {
            let what = format!("a thread made the forbidden system call {call}");
            self.exit.report(ExitReason::Device(what));
        }
    }
}

/// Installs the handler of SIGSYS for this process, once. Threads without a filter never get
/// the signal.
fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(libc::SIGSYS, on_violation).map_err(|err| err.errno())
        })
        .map_err(io::Error::from_raw_os_error)
}

/// Makes the call return `EPERM`, and tells the machine. Only what may be done in a signal
/// handler: atomics, and write(2).
extern "C" fn on_violation(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `ucontext_t` to handlers with SA_SIGINFO, which
    // `register_signal_handler` sets, and nobody else has it while the handler runs.
    let Some(context) = (unsafe { context.cast::<ucontext_t>().as_mut() }) else {
        return;
    };
    let index = usize::try_from(libc::REG_RAX).unwrap_or(0);
    let Some(result) = context.uc_mcontext.gregs.get_mut(index) else {
        return;
    };
    // A trapped call is rolled back: the register holds its number again.
    let call = i32::try_from(*result).unwrap_or(i32::MAX);
    *result = -i64::from(libc::EPERM);
    // SAFETY: null, or set by `confine` on this thread, whose `Arc` outlives the thread's work.
    let Some(mine) = (unsafe { MINE.with(Cell::get).as_ref() }) else {
        return;
    };
    let first = mine
        .call
        .compare_exchange(-1, call, Ordering::AcqRel, Ordering::Acquire);
    if first.is_ok() {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: writes eight bytes to an eventfd that `mine` owns; async-signal-safe.
        unsafe { libc::write(mine.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn forbidden_calls_fail_and_are_told() {
        let violations = Violations::new().unwrap();
        let told = Arc::clone(&violations);
        let thread = std::thread::spawn(move || {
            told.confine(|| {
                // What threads do stays possible.
                std::fs::read("/proc/self/stat").unwrap();
                std::thread::spawn(|| ()).join().unwrap();
                drop(std::os::unix::net::UnixStream::pair().unwrap());
                assert_eq!(told.taken(), None);
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
                let none: [&std::ffi::CStr; 0] = [];
                let denied = nix::unistd::execve(c"/bin/true", &none, &none).unwrap_err();
                assert_eq!(denied, nix::errno::Errno::EPERM);
                // The C library forks with the signal's default action: the child dies.
                let ended = std::process::Command::new("/bin/true").status().unwrap();
                assert_eq!(ended.signal(), Some(libc::SIGSYS));
                let denied = nix::unistd::chroot("/").unwrap_err();
                assert_eq!(denied, nix::errno::Errno::EPERM);
                let denied = std::net::UdpSocket::bind("127.0.0.1:0").unwrap_err();
                assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
            })
        });
        thread.join().unwrap().unwrap();
        let first = violations.taken().map(i64::from);
        assert_eq!(first, Some(libc::SYS_execve));
        // Others of the process are free.
        assert!(
            std::process::Command::new("/bin/true")
                .status()
                .unwrap()
                .success()
        );
    }
}
