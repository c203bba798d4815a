//! The guest's address on the host kernel's vsock.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::NAME;
use crate::hypervisor::HvError;

const DEVICE: &str = "/dev/vhost-vsock";
/// Addresses below are given out by hand, and are privileged as ports.
const FIRST: u32 = 0x1_0000;
/// Those taken already are few among two thousand million.
const TRIES: u32 = 16;

mod ioctl {
    // VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h
    nix::ioctl_write_ptr!(set_guest_cid, 0xaf, 0x60, u64);
}

/// An address that is ours while the device is open.
#[derive(Debug)]
pub(super) struct GuestCid {
    pub(super) cid: u32,
    pub(super) device: OwnedFd,
}

impl GuestCid {
    /// Takes a free one.
    pub(super) fn claim() -> Result<Self, HvError> {
        let failed = |source| HvError::HostDevice {
            vmm: NAME,
            path: DEVICE.into(),
            fix: "it has no other vsock: modprobe vhost_vsock, or use another hypervisor",
            source,
        };
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = device.map_err(failed)?;
        let random = RandomState::new();
        for attempt in 0..TRIES {
            let mut hash = random.build_hasher();
            hash.write_u32(attempt);
            let bytes = hash.finish().to_ne_bytes();
            let [a, b, c, d, ..] = bytes;
            let cid = (u32::from_ne_bytes([a, b, c, d]) >> 1).max(FIRST);
            // SAFETY: the kernel reads one u64, which outlives the call.
            match unsafe { ioctl::set_guest_cid(device.as_raw_fd(), &u64::from(cid)) } {
                Ok(_) => {
                    let device = device.into();
                    return Ok(Self { cid, device });
                }
                Err(nix::Error::EADDRINUSE) => {}
                Err(err) => return Err(failed(err.into())),
            }
        }
        Err(failed(io::ErrorKind::AddrInUse.into()))
    }
}
