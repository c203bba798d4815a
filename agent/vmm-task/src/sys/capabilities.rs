//! Capabilities of the calling process, capabilities(7).

use std::io;

use nix::errno::Errno;

/// The three sets that `capset(2)` writes, as bit masks by capability number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    /// Used for permission checks.
    pub effective: u64,
    /// May become effective.
    pub permitted: u64,
    /// May be kept by a program whose file asks for them.
    pub inheritable: u64,
}

/// Sets all three.
pub fn set_capabilities(sets: &CapabilitySets) -> io::Result<()> {
    // linux/capability.h: version 3 has two of these, for the low and the high numbers.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let half =
        |set: u64, shift: u32| u32::try_from((set >> shift) & u64::from(u32::MAX)).unwrap_or(0);
    let data = |shift| Data {
        effective: half(sets.effective, shift),
        permitted: half(sets.permitted, shift),
        inheritable: half(sets.inheritable, shift),
    };
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let data = [data(0), data(32)];
    // SAFETY: version 3 reads one header and two data records, which outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Removes one capability from the bounding set; `false` when the kernel has no such number.
pub fn drop_bounding_capability(number: u32) -> io::Result<bool> {
    // SAFETY: takes plain numbers.
    match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number)) })
    {
        Ok(_) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Adds one capability to the ambient set.
pub fn raise_ambient_capability(number: u32) -> io::Result<()> {
    let (none, number): (libc::c_ulong, _) = (0, libc::c_ulong::from(number));
    let raise = libc::PR_CAP_AMBIENT_RAISE;
    // SAFETY: takes plain numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, number, none, none) })?;
    Ok(())
}
