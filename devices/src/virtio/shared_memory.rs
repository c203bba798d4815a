//! Host memory that a device shows its guest besides the queues: virtio 1.2, 2.10.
//!
//! A range of this process's address space that stays reserved while it lives. Without
//! access at first; a device puts parts of files there, and takes them away. Nothing in
//! this process touches it, only the guest and system calls that report a bad address: a
//! file that its owner cuts off under a mapping must not fault here.

use std::ffi::c_void;
use std::fs::File;
use std::io;
#[cfg(test)]
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::OnceLock;

use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed, munmap};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

const RESERVED: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// See the module's documentation.
#[derive(Debug)]
pub struct SharedMemory {
    range: MmapRegion,
    guest_address: OnceLock<u64>,
}

impl SharedMemory {
    /// Reserves `bytes`, which are whole pages.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn reserve(bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let range = MmapRegion::build(None, len, libc::PROT_NONE, flags);
        Ok(Self {
            range: range.map_err(io::Error::other)?,
            guest_address: OnceLock::new(),
        })
    }

    /// Length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.size() as u64
    }

    /// Where it is in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.range.as_ptr().addr() as u64
    }

    /// Where the guest has it, once the machine has put it somewhere.
    #[must_use]
    pub fn guest_address(&self) -> Option<u64> {
        self.guest_address.get().copied()
    }

    /// The machine has put it there; at most once.
    ///
    /// # Errors
    /// When it already has a place.
    pub fn place(&self, guest_address: u64) -> io::Result<()> {
        let placed = self.guest_address.set(guest_address);
        placed.map_err(|_| io::ErrorKind::AlreadyExists.into())
    }

    /// Puts part of a file at offset `at`, instead of what is there. All of them are whole
    /// pages; the part may go on past the end of the file.
    ///
    /// # Errors
    /// When it would not be inside, or as mmap(2); nothing has changed then.
    pub fn map(
        &self,
        at: u64,
        bytes: u64,
        file: &File,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let (place, len) = self.part(at, bytes)?;
        let mut access = ProtFlags::READ;
        access.set(ProtFlags::WRITE, writable);
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // First anywhere: what the file refuses must not leave a hole in the range, where
        // other memory of this process could come to lie.
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let mapped = unsafe { mmap(null_mut(), len, access, flags, file, file_offset)? };
        // SAFETY: `mapped` is known to nobody else. The `len` bytes at `place` are inside
        // `self.range` (see `part`), which no reference of this process points into.
        let moved = unsafe { mremap_fixed(mapped, len, len, MremapFlags::MAYMOVE, place) };
        if let Err(err) = moved {
            // SAFETY: as above; it has not been moved.
            let _ = unsafe { munmap(mapped, len) };
            return Err(err.into());
        }
        Ok(())
    }

    /// Takes away what is there.
    ///
    /// # Errors
    /// When it is not inside, or as mmap(2).
    pub fn unmap(&self, at: u64, bytes: u64) -> io::Result<()> {
        let (place, len) = self.part(at, bytes)?;
        let flags = RESERVED | MapFlags::FIXED;
        // SAFETY: inside `self.range`, which no reference of this process points into.
        unsafe { mmap_anonymous(place, len, ProtFlags::empty(), flags)? };
        Ok(())
    }

    /// The address of `bytes` at offset `at`, and their number.
    fn part(&self, at: u64, bytes: u64) -> io::Result<(*mut c_void, usize)> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = at.checked_add(bytes).ok_or_else(outside)?;
        if bytes == 0 || end > self.bytes() {
            return Err(outside());
        }
        let (at, len) = (usize::try_from(at), usize::try_from(bytes));
        let at = at.map_err(|_| outside())?;
        let place = self.range.as_ptr().wrapping_add(at).cast();
        Ok((place, len.map_err(|_| outside())?))
    }

    /// It as a region of guest memory, for system calls only: see the module. Must not be
    /// used when `self` is gone.
    pub(super) fn region(&self) -> io::Result<Option<GuestRegionMmap<()>>> {
        let Some(address) = self.guest_address() else {
            return Ok(None);
        };
        let (start, len) = (self.range.as_ptr(), self.range.size());
        // SAFETY: a mapping that stays while `self` does. The value does not own it.
        let alias =
            unsafe { MmapRegion::build_raw(start, len, libc::PROT_NONE, libc::MAP_PRIVATE) };
        let alias = alias.map_err(io::Error::other)?;
        Ok(GuestRegionMmap::new(alias, GuestAddress(address)))
    }
}

#[cfg(test)]
impl SharedMemory {
    /// The byte that a system call finds at offset `at`.
    pub(crate) fn peek(&self, at: u64) -> io::Result<u8> {
        let (place, _) = self.part(at, 1)?;
        let (reader, writer) = nix::unistd::pipe()?;
        // SAFETY: the kernel copies the byte, or says EFAULT.
        let wrote = unsafe { libc::write(writer.as_raw_fd(), place, 1) };
        let mut byte = [0];
        if wrote != 1 || nix::unistd::read(&reader, &mut byte)? != 1 {
            return Err(io::Error::last_os_error());
        }
        Ok(byte[0])
    }

    /// Has a system call put a byte at offset `at`.
    pub(crate) fn poke(&self, at: u64, byte: u8) -> io::Result<()> {
        let (place, _) = self.part(at, 1)?;
        let (reader, writer) = nix::unistd::pipe()?;
        nix::unistd::write(&writer, &[byte])?;
        // SAFETY: as in `peek`; no reference points there.
        match unsafe { libc::read(reader.as_raw_fd(), place, 1) } {
            1 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn files_come_and_go_without_leaving_a_hole() {
        let memory = SharedMemory::reserve(4 * PAGE).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"content", PAGE).unwrap();
        memory.peek(PAGE).unwrap_err();
        memory.map(PAGE, 2 * PAGE, &file, 0, false).unwrap();
        assert_eq!(memory.peek(2 * PAGE).unwrap(), b'c');
        // Another file in its place, the rest as before.
        let other = tempfile::tempfile().unwrap();
        other.set_len(PAGE).unwrap();
        memory.map(PAGE, PAGE, &other, 0, true).unwrap();
        assert_eq!(memory.peek(PAGE).unwrap(), 0);
        assert_eq!(memory.peek(2 * PAGE).unwrap(), b'c');
        // Cut off by its owner.
        other.set_len(0).unwrap();
        let err = memory.peek(PAGE).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EFAULT));
        // What cannot be mapped changes nothing.
        let path = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(path.path()).unwrap();
        memory.map(2 * PAGE, PAGE, &read_only, 0, true).unwrap_err();
        assert_eq!(memory.peek(2 * PAGE).unwrap(), b'c');
        for (at, bytes) in [
            (3 * PAGE, 2 * PAGE),
            (4 * PAGE, PAGE),
            (0, 0),
            (u64::MAX, PAGE),
        ] {
            memory.map(at, bytes, &file, 0, false).unwrap_err();
            memory.unmap(at, bytes).unwrap_err();
        }
        memory.unmap(0, 4 * PAGE).unwrap();
        memory.peek(2 * PAGE).unwrap_err();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let (start, end) = (memory.host_address(), memory.host_address() + 4 * PAGE);
        let covers = |line: &str| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let (from, to) = (
                u64::from_str_radix(from, 16).ok()?,
                u64::from_str_radix(to, 16).ok()?,
            );
            (from <= start && end <= to && line.contains(" ---p ")).then_some(())
        };
        assert!(maps.lines().any(|line| covers(line).is_some()), "{maps}");
        memory.place(1 << 32).unwrap();
        memory.place(2 << 32).unwrap_err();
        assert_eq!(memory.guest_address(), Some(1 << 32));
    }
}
