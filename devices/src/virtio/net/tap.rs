//! A tap interface and its queues (linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
};

use super::{HEADER_BYTES, MAX_QUEUE_PAIRS};

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty, too long or has a slash.
    #[error("tap name {0:?}: use 1 to 15 characters without slashes")]
    Name(String),
    /// Number of queues or fds.
    #[error("tap with {0} queues: use 1 to {MAX_QUEUE_PAIRS}")]
    Queues(usize),
    /// An fd is not what it should be.
    #[error("fd {index} of the tap is no tap queue opened with IFF_NO_PI and IFF_VNET_HDR")]
    Kind {
        /// Position in the list.
        index: usize,
    },
    /// A system call.
    #[error("tap {name}: {what}: {source}")]
    System {
        /// Name of the interface as far as it is known.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A tap interface. Closing it removes the interface, unless somebody made it persistent or
/// holds more of its queues.
#[derive(Debug)]
pub struct TapDevice {
    name: String,
    queues: Vec<TapQueue>,
}

#[derive(Debug)]
struct TapQueue {
    fd: OwnedFd,
    /// The kernel gives frames to this queue.
    enabled: AtomicBool,
}

impl TapDevice {
    /// Opens tap `name` in the network namespace of the calling thread, creating it if
    /// there is none. A `%d` in the name is replaced by a free number.
    ///
    /// # Errors
    /// See [`TapError`]; `EBUSY` when somebody else has it open.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0']) {
            return Err(TapError::Name(name.to_owned()));
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&queues) {
            return Err(TapError::Queues(queues.into()));
        }
        let system = |what| {
            let name = name.to_owned();
            move |source| TapError::System { name, what, source }
        };
        let mut chosen = name.to_owned();
        let mut fds = Vec::with_capacity(queues.into());
        for _ in 0..queues {
            let fd = ioctl::open().map_err(system("cannot open /dev/net/tun"))?;
            chosen = ioctl::set_interface(fd.as_fd(), &chosen, queues > 1)
                .map_err(system("cannot open the interface"))?;
            fds.push(fd);
        }
        Self::from_fds(fds)
    }

    /// Uses queues of one tap that were opened elsewhere, with IFF_NO_PI and IFF_VNET_HDR.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        if fds.is_empty() || fds.len() > usize::from(MAX_QUEUE_PAIRS) {
            return Err(TapError::Queues(fds.len()));
        }
        let mut name = String::new();
        let mut queues = Vec::with_capacity(fds.len());
        for (index, fd) in fds.into_iter().enumerate() {
            let (found, flags) =
                ioctl::interface(fd.as_fd()).map_err(|_| TapError::Kind { index })?;
            let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            if flags & needed != needed || (index > 0 && found != name) {
                return Err(TapError::Kind { index });
            }
            name = found;
            let system = |what| {
                let name = name.clone();
                move |source| TapError::System { name, what, source }
            };
            let status = rustix::fs::fcntl_getfl(&fd)
                .and_then(|flags| {
                    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
                })
                .map_err(io::Error::from);
            status.map_err(system("cannot make it non-blocking"))?;
            ioctl::set_header_size(fd.as_fd(), HEADER_BYTES)
                .map_err(system("cannot set the header size"))?;
            queues.push(TapQueue {
                fd,
                enabled: AtomicBool::new(true),
            });
        }
        Ok(Self { name, queues })
    }

    /// Name of the interface when it was opened.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Its queues, for a VMM in another process.
    #[must_use]
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.queues.into_iter().map(|queue| queue.fd).collect()
    }

    /// Queue `index`; with fewer queues than the guest has, they are shared.
    pub(super) fn queue(&self, index: usize) -> Option<BorrowedFd<'_>> {
        let usable = self.enabled().max(1);
        let queue = self.queues.get(index.checked_rem(usable)?)?;
        Some(queue.fd.as_fd())
    }

    /// Queue `index` if the kernel gives frames to it.
    pub(super) fn receiver(&self, index: usize) -> Option<BorrowedFd<'_>> {
        let queue = self.queues.get(index)?;
        queue
            .enabled
            .load(Ordering::Acquire)
            .then(|| queue.fd.as_fd())
    }

    fn enabled(&self) -> usize {
        let on = |queue: &&TapQueue| queue.enabled.load(Ordering::Acquire);
        self.queues.iter().take_while(on).count()
    }

    /// Lets the kernel spread frames over the first `count` queues only.
    pub(super) fn enable(&self, count: usize) -> io::Result<()> {
        // A tap with one queue need not be a multiqueue one.
        for (index, queue) in self.queues.iter().enumerate().skip(1) {
            let wanted = index < count;
            if queue.enabled.load(Ordering::Acquire) != wanted {
                ioctl::set_queue(queue.fd.as_fd(), wanted)?;
                queue.enabled.store(wanted, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Which frames the kernel may leave unfinished for the guest: `features` as in
    /// `VIRTIO_NET_F_GUEST_*`.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let queue = self
            .queues
            .first()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        ioctl::set_offload(queue.fd.as_fd(), offload_flags(features))
    }
}

/// `TUN_F_*` for `VIRTIO_NET_F_GUEST_*`: nothing works without checksums (5.1.3.1).
fn offload_flags(features: u64) -> u32 {
    let has = |feature: u32| features & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let segments = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    ];
    pairs
        .iter()
        .filter(|(feature, _)| has(*feature))
        // The kernel refuses congestion marks of segments that there are none of.
        .filter(|(feature, _)| segments || *feature != VIRTIO_NET_F_GUEST_ECN)
        .fold(0, |flags, (_, flag)| flags | flag)
}

mod ioctl {
    //! The ioctls of /dev/net/tun.

    use std::fs::OpenOptions;
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
    use std::os::unix::fs::OpenOptionsExt;

    use libc::{c_int, ifreq};

    const INT: usize = size_of::<c_int>();

    nix::ioctl_readwrite_bad!(tunsetiff, nix::request_code_write!(b'T', 202, INT), ifreq);
    nix::ioctl_write_int_bad!(tunsetoffload, nix::request_code_write!(b'T', 208, INT));
    nix::ioctl_read_bad!(tungetiff, nix::request_code_read!(b'T', 210, INT), ifreq);
    nix::ioctl_write_ptr_bad!(
        tunsetvnethdrsz,
        nix::request_code_write!(b'T', 216, INT),
        c_int
    );
    nix::ioctl_readwrite_bad!(tunsetqueue, nix::request_code_write!(b'T', 217, INT), ifreq);

    pub(super) fn open() -> io::Result<OwnedFd> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        Ok(file.into())
    }

    /// A request for interface `name`, which is shorter than IFNAMSIZ.
    fn request(name: &str, flags: c_int) -> ifreq {
        // SAFETY: all zero is a valid ifreq.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        // The kernel's field is a short; all flags used here fit its bits.
        let [low, high, ..] = flags.to_le_bytes();
        request.ifr_ifru.ifru_flags = i16::from_le_bytes([low, high]);
        request
    }

    fn name(request: &ifreq) -> String {
        let bytes: Vec<u8> = request
            .ifr_name
            .iter()
            .map(|char| char.to_ne_bytes()[0])
            .take_while(|byte| *byte != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Makes `fd` a queue of `wanted`; returns the interface's name.
    pub(super) fn set_interface(
        fd: BorrowedFd<'_>,
        wanted: &str,
        multi_queue: bool,
    ) -> io::Result<String> {
        let base = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let attempt = |flags| {
            let mut request = request(wanted, flags);
            // SAFETY: the kernel reads and writes one ifreq.
            unsafe { tunsetiff(fd.as_raw_fd(), &raw mut request) }?;
            Ok(name(&request))
        };
        match attempt(if multi_queue {
            base | libc::IFF_MULTI_QUEUE
        } else {
            base
        }) {
            // An existing interface that was made for several queues.
            Err(nix::Error::EINVAL) if !multi_queue => {
                attempt(base | libc::IFF_MULTI_QUEUE).map_err(io::Error::from)
            }
            other => other.map_err(io::Error::from),
        }
    }

    /// Name and IFF_* flags of the interface behind `fd`.
    pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
        let mut request = request("", 0);
        // SAFETY: the kernel writes one ifreq.
        unsafe { tungetiff(fd.as_raw_fd(), &raw mut request) }?;
        // SAFETY: TUNGETIFF fills in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok((name(&request), c_int::from(flags.cast_unsigned())))
    }

    pub(super) fn set_header_size(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
        let bytes = c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: the kernel reads one int.
        unsafe { tunsetvnethdrsz(fd.as_raw_fd(), &raw const bytes) }?;
        Ok(())
    }

    pub(super) fn set_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
        let flags = c_int::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: the argument is a plain number.
        unsafe { tunsetoffload(fd.as_raw_fd(), flags) }?;
        Ok(())
    }

    pub(super) fn set_queue(fd: BorrowedFd<'_>, enabled: bool) -> io::Result<()> {
        let flag = if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut request = request("", flag);
        // SAFETY: the kernel reads one ifreq.
        unsafe { tunsetqueue(fd.as_raw_fd(), &raw mut request) }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_need_checksums() {
        let tso = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_UFO;
        assert_eq!(offload_flags(tso), 0);
        let all = tso | 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(
            offload_flags(all),
            libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_UFO
        );
        let marks = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(offload_flags(marks), libc::TUN_F_CSUM);
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let bad = TapDevice::open("", 1).unwrap_err();
        assert!(matches!(bad, TapError::Name(_)), "{bad}");
        let bad = TapDevice::open("sixteen-chars-xx", 1).unwrap_err();
        assert!(matches!(bad, TapError::Name(_)), "{bad}");
        for queues in [0, MAX_QUEUE_PAIRS + 1] {
            let bad = TapDevice::open("tap%d", queues).unwrap_err();
            assert!(matches!(bad, TapError::Queues(_)), "{bad}");
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        let bad = TapDevice::from_fds(vec![file.into()]).unwrap_err();
        assert!(matches!(bad, TapError::Kind { index: 0 }), "{bad}");
        let bad = TapDevice::from_fds(Vec::new()).unwrap_err();
        assert!(matches!(bad, TapError::Queues(0)), "{bad}");
    }
}
