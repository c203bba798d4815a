//! The few system interfaces without a safe wrapper elsewhere.
//! All `unsafe` of the agent is in this module.

mod capabilities;
pub mod fork_guard;

pub use self::capabilities::{
    CapabilitySets, drop_bounding_capability, raise_ambient_capability, set_capabilities,
};

use std::ffi::{CString, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Owns a descriptor that has no owner yet.
pub fn own_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass what accept4 or SCM_RIGHTS returned, or what its maker has
    // forgotten; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Watches a descriptor in the event loop.
///
/// For owners whose descriptor stays the same until they are dropped, which the types that
/// implement [`Owned`] are.
pub fn polled<T: Owned>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: by `Owned`, the descriptor is neither closed nor replaced while `fd` lives, and
    // the `AsyncFd` owns `fd`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Owners of one descriptor for life.
pub trait Owned: AsRawFd {}
impl Owned for std::fs::File {}
impl Owned for std::sync::Arc<OwnedFd> {}

/// Closes every sequenced-packet socket of the process. Returns how many there were.
///
/// libcontainer talks to its children over such sockets, which it leaves open when it fails.
/// The agent has none of its own.
pub fn close_packet_sockets() -> io::Result<usize> {
    use nix::sys::socket::{SockType, getsockopt, sockopt};
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(fd) = name.to_str().and_then(|n| n.parse::<RawFd>().ok()) else {
            continue;
        };
        // SAFETY: open, or the lookup fails; not closed before the list is complete.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        if getsockopt(&borrowed, sockopt::SockType) == Ok(SockType::SeqPacket) {
            found.push(fd);
        }
    }
    // The library that made them has forgotten them.
    Ok(found.into_iter().map(own_fd).count())
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStatus(libc::c_int);

impl RawStatus {
    /// 0 to 255 as the process returned it, or 128 + signal.
    pub fn code(self) -> u32 {
        let code = if libc::WIFSIGNALED(self.0) {
            128 + libc::WTERMSIG(self.0)
        } else {
            libc::WEXITSTATUS(self.0)
        };
        u32::try_from(code).unwrap_or(255)
    }
}

/// Reaps one ended child, if there is one.
///
/// nix's `waitpid` loses the pid of children killed by real-time signals.
pub fn reap_one() -> Option<(i32, RawStatus)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call; WNOHANG keeps it from blocking.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match pid {
            1.. => return Some((pid, RawStatus(status))),
            -1 if Errno::last() == Errno::EINTR => {}
            _ => return None,
        }
    }
}

/// Sends any signal number, real-time ones included.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers.
    Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Starts a process that is the first of a new PID namespace and collects its orphans until
/// the agent ends. Returns its pid here.
///
/// The agent has one thread, so that its child may go on as a copy of it.
pub fn hold_pid_namespace() -> io::Result<i32> {
    let flags = libc::c_long::from(libc::CLONE_NEWPID | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: a fork with a flag: no memory is shared, and the stack stays as it is.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    if pid == 0 {
        collect_orphans();
    }
    let pid = Errno::result(pid)?;
    i32::try_from(pid).map_err(io::Error::other)
}

/// The life of that process.
fn collect_orphans() -> ! {
    // SAFETY: nobody in this process uses a descriptor any more: streams of others must not
    // stay open in it.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    let name = c"pause";
    // SAFETY: the name outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    let mut ended = nix::sys::signal::SigSet::empty();
    // Blocked since the agent began.
    ended.add(nix::sys::signal::Signal::SIGCHLD);
    loop {
        let _ = ended.wait();
        while reap_one().is_some() {}
    }
}

/// Sets a terminal's size in characters.
pub fn set_window_size(tty: &impl AsFd, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize, which outlives the call.
    Errno::result(unsafe {
        libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size)
    })?;
    Ok(())
}

/// Receives the one descriptor that is already queued on a Unix socket.
pub fn receive_fd(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut data = [0_u8; 64];
    let mut parts = [io::IoSliceMut::new(&mut data)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<UnixAddr>(
        socket.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut space),
        flags,
    )?;
    let mut received = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            for fd in fds {
                received = Some(own_fd(fd));
            }
        }
    }
    received.ok_or_else(|| io::Error::other("the message carries no descriptor"))
}

/// Brings a network interface up.
pub fn interface_up(name: &str) -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len().saturating_sub(1);
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from.cast_signed();
    }
    let up = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(up).unwrap_or(0);
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })?;
    Ok(())
}

/// Maps every page of this program now, in one call for each of its segments: otherwise
/// each first use of a few pages is a fault, in every clone of this machine again.
pub fn map_program() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        // address range, permissions, offset, device, inode, path
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(inode)) =
            (fields.next(), fields.next(), fields.nth(2))
        else {
            continue;
        };
        let ends = range.split_once('-');
        let ends = ends.map(|(start, end)| (parse_hex(start), parse_hex(end)));
        let Some((Some(start), Some(end))) = ends else {
            continue;
        };
        // Files only; there are no others than this program.
        if inode == "0" || !access.starts_with('r') {
            continue;
        }
        let Some(start) = NonNull::new(std::ptr::without_provenance_mut::<c_void>(start)) else {
            continue;
        };
        let bytes = end.saturating_sub(start.addr().get());
        // SAFETY: MADV_POPULATE_READ changes no content and no mapping; a range that is no
        // longer mapped is an error.
        unsafe { madvise(start, bytes, MmapAdvise::MADV_POPULATE_READ) }?;
    }
    Ok(())
}

fn parse_hex(text: &str) -> Option<usize> {
    usize::from_str_radix(text, 16).ok()
}

/// Lets connects of a vsock socket wait for their answer as long as the kernel allows:
/// 30 years instead of two seconds.
pub fn connect_without_deadline(socket: &impl AsFd) -> io::Result<()> {
    // linux/vm_sockets.h
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let limit = libc::timeval {
        tv_sec: 30 * 365 * 86_400,
        tv_usec: 0,
    };
    let len = libc::socklen_t::try_from(size_of_val(&limit)).unwrap_or(0);
    // SAFETY: the kernel reads one timeval of this length, which outlives the call.
    Errno::result(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const limit).cast(),
            len,
        )
    })?;
    Ok(())
}

/// Mixes `bytes` into the kernel's entropy pool, credits them and reseeds the generator.
pub fn add_entropy(random: &impl AsFd, bytes: &[u8]) -> io::Result<()> {
    // `struct rand_pool_info` of linux/random.h with its flexible array at full length.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        buf_bytes: libc::c_int,
        buf: [u8; ENTROPY_CHUNK],
    }
    const ENTROPY_CHUNK: usize = 256;
    // _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

    let fd = random.as_fd().as_raw_fd();
    for chunk in bytes.chunks(ENTROPY_CHUNK) {
        let len = libc::c_int::try_from(chunk.len()).unwrap_or(0);
        let mut info = PoolInfo {
            entropy_bits: len.saturating_mul(8),
            buf_bytes: len,
            buf: [0; ENTROPY_CHUNK],
        };
        for (to, from) in info.buf.iter_mut().zip(chunk) {
            *to = *from;
        }
        // SAFETY: the kernel reads the two counts and `buf_bytes` bytes of `buf`, which holds
        // at least that many.
        Errno::result(unsafe { libc::ioctl(fd, RNDADDENTROPY, &raw const info) })?;
    }
    // SAFETY: takes no argument.
    Errno::result(unsafe { libc::ioctl(fd, RNDRESEEDCRNG) })?;
    Ok(())
}

/// Replaces the process image; returns only when that fails.
///
/// The arrays are built before the call so that a failed attempt can be repeated cheaply
/// for the next directory of `PATH`.
pub fn exec(path: &CString, args: &[CString], env: &[CString]) -> Errno {
    match nix::unistd::execve(path, args, env) {
        Ok(never) => match never {},
        Err(errno) => errno,
    }
}

/// Undoes what the agent set for itself and a program would inherit: the blocked SIGCHLD
/// and the ignored SIGPIPE.
pub fn reset_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

/// Keeps a descriptor from programs that are executed.
pub fn close_on_exec(fd: &impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Makes `command`'s program the leader of a session, whose terminal is its stdin if `terminal`.
pub fn lead_session(command: &mut std::process::Command, terminal: bool) {
    use std::os::unix::process::CommandExt;
    // SAFETY: runs between fork and exec; only async-signal-safe system calls, no memory is
    // allocated.
    unsafe {
        command.pre_exec(move || {
            reset_signals()?;
            nix::unistd::setsid()?;
            if terminal {
                Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            Ok(())
        });
    }
}

/// Installs a seccomp filter in the calling process, seccomp(2).
pub fn install_seccomp(
    program: &[seccompiler::sock_filter],
    flags: libc::c_ulong,
) -> io::Result<()> {
    let len = libc::c_ushort::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut().cast(),
    };
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads `len` instructions, which outlive the call; both types are
    // `struct sock_filter` of linux/filter.h.
    Errno::result(unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) })?;
    Ok(())
}

/// Closes a descriptor in a forked child.
pub fn close_in_child(fd: RawFd) {
    if fork_guard::is_child() {
        // SAFETY: the owner lives in the parent; its copy in this process is never used or
        // dropped, since the process executes a program or exits.
        unsafe { libc::close(fd) };
    }
}

/// Ends a forked child at once, without running anything of the agent's.
pub fn exit_child(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_shell() {
        // As wait(2) encodes them: code << 8, or the signal in the low seven bits.
        for (raw, code) in [
            (0, 0),
            (7 << 8, 7),
            (255 << 8, 255),
            (9, 137),
            (15, 143),
            (0x80 | 11, 139),
            (34, 162),
        ] {
            assert_eq!(RawStatus(raw).code(), code, "{raw:#x}");
        }
    }

    #[test]
    fn the_loopback_interface_can_be_brought_up() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        interface_up("lo").unwrap();
        assert_eq!(
            interface_up("nosuchif0").unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
    }

    #[test]
    fn a_descriptor_travels_over_a_socket() {
        use nix::sys::socket::{ControlMessage, sendmsg};
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<UnixAddr>(
            a.as_raw_fd(),
            &[io::IoSlice::new(b"x")],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        assert_ne!(receive_fd(&b).unwrap().as_raw_fd(), file.as_raw_fd());
        assert_eq!(
            receive_fd(&b).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }
}
