//! userfaultfd(2), as far as missing pages go.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use devices::virtio::release::PAGE_BYTES;
use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFDIO_REGISTER_MODE_MISSING, uffd_msg, uffdio_api,
    uffdio_copy, uffdio_range, uffdio_register, uffdio_zeropage,
};
use nix::errno::Errno;
use rustix::mm::UserfaultfdFlags;
use vm_memory::{GuestMemoryRegion as _, GuestRegionMmap};

/// "The ioctls are of this type" (linux/userfaultfd.h).
const TYPE: u8 = 0xaa;

/// Makes an fd for who may open it.
const DEVICE: &str = "/dev/userfaultfd";

nix::ioctl_write_int_bad!(
    /// Makes an fd, with the system call's flags.
    userfaultfd_ioc_new,
    nix::request_code_none!(TYPE, 0x00)
);
nix::ioctl_readwrite!(
    /// Agrees on a version.
    uffdio_api_ioctl, TYPE, 0x3f, uffdio_api);
nix::ioctl_readwrite!(
    /// Asks for the faults of a range.
    uffdio_register_ioctl, TYPE, 0x00, uffdio_register);
nix::ioctl_read!(
    /// Wakes who waits for a range.
    uffdio_wake_ioctl, TYPE, 0x02, uffdio_range);
nix::ioctl_readwrite!(
    /// Fills missing pages.
    uffdio_copy_ioctl, TYPE, 0x03, uffdio_copy);
nix::ioctl_readwrite!(
    /// Fills missing pages with zeroes.
    uffdio_zeropage_ioctl, TYPE, 0x04, uffdio_zeropage);

/// Who touches a registered page that is missing waits until it is there or this is dropped.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    pub(super) fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the fd is used for nothing but guest memory, whose content this process
        // takes for arbitrary anyway.
        let fd = match unsafe { rustix::mm::userfaultfd(flags) } {
            Err(rustix::io::Errno::PERM) => Self::open_by_device(flags)?,
            opened => opened?,
        };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one `uffdio_api`.
        unsafe { uffdio_api_ioctl(fd.as_raw_fd(), &raw mut api) }?;
        Ok(Self(fd))
    }

    /// For processes without `CAP_SYS_PTRACE` that may open the device.
    fn open_by_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
        let device = File::options().read(true).write(true).open(DEVICE)?;
        let flags = flags.bits().cast_signed();
        // SAFETY: the ioctl takes flags by value and returns a new fd.
        let fd = unsafe { userfaultfd_ioc_new(device.as_raw_fd(), flags) }?;
        // SAFETY: the fd is new, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Takes over the missing pages of a private anonymous region.
    pub(super) fn register(&self, region: &GuestRegionMmap) -> io::Result<()> {
        let mut register = uffdio_register {
            range: uffdio_range {
                start: region.as_ptr().addr() as u64,
                len: region.len(),
            },
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one `uffdio_register`. The range is a mapping of
        // guest memory, so no Rust reference to what is in it exists.
        unsafe { uffdio_register_ioctl(self.0.as_raw_fd(), &raw mut register) }?;
        Ok(())
    }

    /// Address of a missing page that somebody has touched, if there is one.
    pub(super) fn next_fault(&self) -> io::Result<Option<usize>> {
        let mut message = [0; size_of::<uffd_msg>()];
        match rustix::io::read(&self.0, &mut message) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(err) => return Err(err.into()),
        }
        // SAFETY: every pattern of bytes is a `uffd_msg`: integers and a union of structures
        // of integers.
        let message: uffd_msg = unsafe { std::mem::transmute(message) };
        if u32::from(message.event) != UFFD_EVENT_PAGEFAULT {
            return Err(io::Error::other("not a page fault"));
        }
        // SAFETY: this is the member of the union for the event.
        let address = unsafe { message.arg.pagefault.address };
        usize::try_from(address).map(Some).map_err(io::Error::other)
    }

    /// Puts `content`, whole pages, at `start`; pages that are there already stay.
    pub(super) fn copy(&self, start: usize, content: &[u8]) -> io::Result<()> {
        each_part(content.len(), |done, len| {
            let part = content.get(done..).unwrap_or_default();
            let mut copy = uffdio_copy {
                dst: start.saturating_add(done) as u64,
                src: part.as_ptr().addr() as u64,
                len: len as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the ioctl reads and writes one `uffdio_copy`, reads `len` bytes of
            // `part`, and writes to nothing but missing pages of registered ranges.
            let result = unsafe { uffdio_copy_ioctl(self.0.as_raw_fd(), &raw mut copy) };
            (result, copy.copy)
        })
    }

    /// As [`Self::copy`] with `len` zeroes.
    pub(super) fn zero(&self, start: usize, len: usize) -> io::Result<()> {
        each_part(len, |done, len| {
            let mut zero = uffdio_zeropage {
                range: uffdio_range {
                    start: start.saturating_add(done) as u64,
                    len: len as u64,
                },
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: the ioctl reads and writes one `uffdio_zeropage`, and changes nothing but
            // missing pages of registered ranges.
            let result = unsafe { uffdio_zeropage_ioctl(self.0.as_raw_fd(), &raw mut zero) };
            (result, zero.zeropage)
        })
    }

    /// Wakes who waits for a page of the `len` bytes at `start`.
    pub(super) fn wake(&self, start: usize, len: usize) -> io::Result<()> {
        let mut range = uffdio_range {
            start: start as u64,
            len: len as u64,
        };
        // SAFETY: the ioctl reads one `uffdio_range`, and wakes threads that look again.
        unsafe { uffdio_wake_ioctl(self.0.as_raw_fd(), &raw mut range) }?;
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Calls `fill` with how far it is and what is left of `len` bytes until all are filled. It
/// returns what the ioctl said, and how many bytes it has filled if not all.
fn each_part(
    len: usize,
    mut fill: impl FnMut(usize, usize) -> (nix::Result<i32>, i64),
) -> io::Result<()> {
    let page = usize::try_from(PAGE_BYTES).map_err(io::Error::other)?;
    let mut done = 0_usize;
    while done < len {
        let left = len.saturating_sub(done);
        done = match fill(done, left) {
            (Ok(_), _) => return Ok(()),
            (Err(Errno::EEXIST), _) => done.saturating_add(page),
            // Interrupted by a change of the address space, after some pages or none.
            (Err(Errno::EAGAIN), filled) => {
                done.saturating_add(usize::try_from(filled).unwrap_or(0))
            }
            (Err(err), _) => return Err(err.into()),
        };
    }
    Ok(())
}
