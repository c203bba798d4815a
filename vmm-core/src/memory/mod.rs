//! Guest memory: one file, mapped around the hole where devices live.

mod chunks;
mod image;
mod lazy;
mod private;
mod stored;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use devices::virtio::GuestMemory;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub(crate) use self::chunks::ChunkList;
use self::chunks::ChunkWriter;
pub use self::chunks::MemoryDigest;
pub use self::image::MemoryImage;
use self::lazy::Lazy;
pub(crate) use self::lazy::is_possible as can_be_lazy;
pub(crate) use self::stored::StoredMemory;
use crate::arch::layout;

/// How much memory a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSize {
    /// There from the beginning, in bytes.
    pub boot_bytes: u64,
    /// Address space that a memory device can fill later, in bytes.
    pub hotplug_bytes: u64,
}

impl RamSize {
    /// All of it.
    #[must_use]
    pub fn total_bytes(self) -> u64 {
        self.boot_bytes.saturating_add(self.hotplug_bytes)
    }

    /// Where the hotplug memory begins: above all else, at one of Linux's memory blocks.
    #[must_use]
    pub fn hotplug_start(self) -> u64 {
        let high = self.boot_bytes.saturating_sub(layout::DEVICE_HOLE_START);
        layout::DEVICE_HOLE_END
            .saturating_add(high)
            .checked_next_multiple_of(HOTPLUG_ALIGN_BYTES)
            .unwrap_or(u64::MAX)
    }

    /// Where the memory of a device can begin: above all of it.
    #[must_use]
    pub fn devices_start(self) -> u64 {
        self.hotplug_start()
            .saturating_add(self.hotplug_bytes)
            .checked_next_multiple_of(DEVICES_ALIGN_BYTES)
            .unwrap_or(u64::MAX)
    }
}

impl From<u64> for RamSize {
    fn from(boot_bytes: u64) -> Self {
        Self {
            boot_bytes,
            hotplug_bytes: 0,
        }
    }
}

/// Linux on x86-64 adds memory in blocks of this many bytes.
pub const HOTPLUG_ALIGN_BYTES: u64 = 128 << 20;

/// What one entry of a page table's third level covers.
const DEVICES_ALIGN_BYTES: u64 = 1 << 30;

/// Size of a huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// RAM of one machine. Clones of this value share it; it is freed with the last one.
#[derive(Clone, Debug)]
pub struct GuestRam {
    mapped: GuestMemory,
    backing: Backing,
    size: RamSize,
    /// Fills the memory of a clone of files.
    lazy: Option<Arc<Lazy>>,
}

/// Whose pages a machine runs on.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// A memfd of its own, mapped shared; maybe of huge pages.
    Own { file: Arc<File>, huge: bool },
    /// An image: only what the machine writes is its own.
    Image(MemoryImage),
}

impl Backing {
    /// What to map and how.
    fn mapping(&self) -> (Option<&Arc<File>>, libc::c_int) {
        let (file, sharing) = match self {
            // Reserved, or a fault that finds no huge page would end this process.
            Self::Own { file, huge: true } => return (Some(file), libc::MAP_SHARED),
            Self::Own { file, huge: false } => (Some(file), libc::MAP_SHARED),
            Self::Image(image) => match image.memfd() {
                Some(file) => (Some(file), libc::MAP_PRIVATE),
                None => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            },
        };
        (file, sharing | libc::MAP_NORESERVE)
    }
}

impl GuestRam {
    /// `size` of zeroed memory in a memfd that shows as `name` in `/proc/PID/maps`.
    /// Pages are taken from the host when they are first touched.
    ///
    /// The memfd can no longer change its size, so that no mapping of it can ever fault
    /// in this process.
    ///
    /// # Errors
    /// When the host cannot create or map it.
    pub fn new(name: &str, size: impl Into<RamSize>) -> io::Result<Self> {
        Self::of_pages(name, size.into(), false)
    }

    /// [`Self::new`] in huge pages of [`HUGE_PAGE_BYTES`], all of them taken from the host at
    /// once; `size` is a multiple of that.
    ///
    /// # Errors
    /// When the host has too few free ones.
    pub fn huge(name: &str, size: impl Into<RamSize>) -> io::Result<Self> {
        Self::of_pages(name, size.into(), true).map_err(|err| {
            let why = format!(
                "{err}; are enough huge pages of 2 MiB free on this host (HugePages_Free in \
                 /proc/meminfo, the sysctl vm.nr_hugepages)?"
            );
            io::Error::new(err.kind(), why)
        })
    }

    fn of_pages(name: &str, size: RamSize, huge: bool) -> io::Result<Self> {
        let file = sealable_memfd(name, size.total_bytes(), huge)?;
        fcntl(
            &file,
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
        )?;
        let file = Arc::new(file);
        Self::map(Backing::Own { file, huge }, size)
    }

    fn map(backing: Backing, size: RamSize) -> io::Result<Self> {
        let mut regions = Vec::new();
        let (file, flags) = backing.mapping();
        for region in ram_regions(size) {
            let len = usize::try_from(region.bytes).map_err(io::Error::other)?;
            let file = file.map(|file| FileOffset::from_arc(Arc::clone(file), region.file_offset));
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let mapping = MmapRegion::build(file, len, access, flags).map_err(io::Error::other)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(region.start))
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            regions.push(region);
        }
        let mapped = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self {
            mapped: Arc::new(mapped),
            backing,
            size,
            lazy: None,
        })
    }

    /// As devices see it.
    #[must_use]
    pub fn guest_memory(&self) -> &GuestMemory {
        &self.mapped
    }

    /// What the machine boots with, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.size.boot_bytes
    }

    /// All of it.
    #[must_use]
    pub fn size(&self) -> RamSize {
        self.size
    }

    /// Bytes that host pages back now; of a clone, those that it does not share.
    ///
    /// # Errors
    /// When the memory cannot be examined.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        match &self.backing {
            Backing::Own { file, .. } => allocated_bytes(file),
            Backing::Image(_) => private::bytes(&self.mapped),
        }
    }
}

impl GuestRam {
    /// Writes all of it to an empty file, leaving holes where it is zero and where it is as
    /// in `base`. Nothing may write to it meanwhile.
    ///
    /// # Errors
    /// As the file's writes.
    pub(crate) fn write_to(&self, to: &File, base: Option<&ChunkList>) -> io::Result<ChunkList> {
        match &self.backing {
            Backing::Own { file, .. } => {
                let mut writer = ChunkWriter::new(to, base);
                let bytes = self.size.total_bytes();
                chunks::for_each_chunk(file, bytes, |at, chunk| writer.add(at, chunk))?;
                writer.finish(bytes)
            }
            Backing::Image(image) => private::write(&self.mapped, image, to, base),
        }
    }

    /// The machine is whole: from now on memory that cannot be read ends it.
    ///
    /// # Errors
    /// Something could not be read before.
    pub(crate) fn in_use(&self) -> io::Result<()> {
        self.lazy.as_ref().map_or(Ok(()), |lazy| lazy.in_use())
    }

    /// The guest does not run any more: who waits for memory that cannot be read shall not.
    pub(crate) fn give_up(&self) {
        if let Some(lazy) = &self.lazy {
            lazy.give_up();
        }
    }
}

/// stat(2): `st_blocks` counts 512-byte units.
fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks().saturating_mul(512))
}

fn sealable_memfd(name: &str, bytes: u64, huge: bool) -> io::Result<File> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let fd = memfd_create(name, flags)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    Ok(file)
}

/// A run of RAM in guest-physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// Where it lies in the memfd.
    pub file_offset: u64,
}

/// Where RAM goes: from zero up to the device hole, the rest from 4 GiB on, behind it what can
/// be plugged in.
pub fn ram_regions(size: impl Into<RamSize>) -> impl Iterator<Item = RamRegion> {
    let size = size.into();
    let bytes = size.boot_bytes;
    let low = bytes.min(layout::DEVICE_HOLE_START);
    let high = bytes.saturating_sub(low);
    [
        RamRegion {
            start: 0,
            bytes: low,
            file_offset: 0,
        },
        RamRegion {
            start: layout::DEVICE_HOLE_END,
            bytes: high,
            file_offset: low,
        },
        RamRegion {
            start: size.hotplug_start(),
            bytes: size.hotplug_bytes,
            file_offset: bytes,
        },
    ]
    .into_iter()
    .filter(|region| region.bytes > 0)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory as _};

    use super::*;

    #[test]
    fn small_memory_is_one_region() {
        let regions: Vec<_> = ram_regions(128_u64 << 20).collect();
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[0].bytes, 128 << 20);
    }

    #[test]
    fn large_memory_goes_around_the_hole() {
        let bytes = 8_u64 << 30;
        let regions: Vec<_> = ram_regions(bytes).collect();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[0].bytes + regions[1].bytes, bytes);
        assert_eq!(regions[1].start, 1 << 32);
        assert_eq!(regions[1].file_offset, regions[0].bytes);
    }

    #[test]
    fn what_can_be_plugged_in_comes_last() {
        for (boot_bytes, start) in [
            (64 << 20, 4 << 30),
            ((4 << 30) + 4096, (5_u64 << 30) + (128 << 20)),
        ] {
            let size = RamSize {
                boot_bytes,
                hotplug_bytes: 256 << 20,
            };
            let last = ram_regions(size).last().unwrap();
            assert_eq!((last.start, last.bytes), (start, 256 << 20));
            assert_eq!(last.file_offset, boot_bytes);
            let above = size.devices_start();
            assert!(above >= start + (256 << 20) && above.is_multiple_of(1 << 30));
        }
    }

    #[test]
    fn pages_are_taken_when_touched() {
        let ram = GuestRam::new("test", 64_u64 << 20).unwrap();
        assert_eq!(ram.resident_bytes().unwrap(), 0);
        ram.guest_memory()
            .write_slice(&[1; 4096], GuestAddress(0x10_0000))
            .unwrap();
        let resident = ram.resident_bytes().unwrap();
        assert!((4096..=4 << 20).contains(&resident), "{resident}");
        assert_eq!(ram.guest_memory().last_addr().0, (64 << 20) - 1);
    }

    #[test]
    fn huge_pages_are_taken_at_once_or_not_at_all() {
        let size = 2 * HUGE_PAGE_BYTES;
        let ram = match GuestRam::huge("test", size) {
            Ok(ram) => ram,
            Err(err) => return println!("skipped: {err}"),
        };
        ram.guest_memory().write_obj(5_u8, GuestAddress(9)).unwrap();
        assert_eq!(ram.resident_bytes().unwrap(), HUGE_PAGE_BYTES);
        let copy = tempfile::tempfile().unwrap();
        ram.write_to(&copy, None).unwrap();
        let too_many = GuestRam::huge("test", 1_u64 << 40).unwrap_err();
        assert!(
            too_many.to_string().contains("vm.nr_hugepages"),
            "{too_many}"
        );
    }

    #[test]
    fn the_memfd_cannot_be_resized() {
        let ram = GuestRam::new("test", 1_u64 << 20).unwrap();
        let (Some(file), _) = ram.backing.mapping() else {
            panic!("not in a file");
        };
        file.set_len(4096).unwrap_err();
        file.set_len(2 << 20).unwrap_err();
    }
}
