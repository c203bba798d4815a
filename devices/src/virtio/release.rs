//! Guest pages given back to the host, for the balloon and the memory device.

use std::fmt;
use std::io;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use super::GuestMemory;

/// The smallest unit that devices release: a page, as virtio counts them.
pub const PAGE_BYTES: u64 = 4096;

/// Guest-physical addresses from `start` (included) to `end` (excluded).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// `bytes` from `start` on; `None` when that is nothing or wraps around.
    #[must_use]
    pub fn new(start: u64, bytes: u64) -> Option<Self> {
        let end = start.checked_add(bytes)?;
        (end > start).then_some(Self { start, end })
    }

    /// First address.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes; never zero.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The whole `granule`s (a power of two) inside, if any.
    #[must_use]
    pub fn shrink_to(self, granule: u64) -> Option<Self> {
        let start = self.start.checked_next_multiple_of(granule)?;
        let end = self.end.checked_sub(self.end.checked_rem(granule)?)?;
        (end > start).then_some(Self { start, end })
    }

    /// Whether all of it is memory.
    #[must_use]
    pub fn is_in(self, memory: &GuestMemory) -> bool {
        usize::try_from(self.bytes())
            .is_ok_and(|bytes| memory.check_range(GuestAddress(self.start), bytes))
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// Sorts `ranges` and joins those that overlap or touch.
pub fn coalesce(ranges: &mut Vec<PageRange>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let joins = next.start <= kept.end;
        if joins {
            kept.end = kept.end.max(next.end);
        }
        joins
    });
}

/// Gives pages back to the host. The VMM supplies it: only the VMM knows what is behind
/// guest memory.
pub trait PageReleaser: Send + Sync + fmt::Debug {
    /// Frees the host memory behind `ranges`. What the guest reads there afterwards is not
    /// specified until it writes: zeroes, or in a clone what its template held.
    ///
    /// # Errors
    /// When a range is not guest memory or the host refuses; earlier ranges are released.
    fn release(&self, ranges: &[PageRange]) -> io::Result<()>;
}

/// Releases pages of guest memory that this process has mapped.
///
/// * A shared mapping (a VM that was booted) owns the pages of its memfd: they are punched
///   out of the file.
/// * A private mapping (a clone) owns only the pages it has written: its copies are
///   dropped, the template's pages stay for the other clones.
#[derive(Debug)]
pub struct HostPages {
    memory: GuestMemory,
    granule: u64,
}

impl HostPages {
    /// Releases pages of `memory`, which must hold RAM and nothing else: a window onto
    /// host files would lose the content of the files.
    #[must_use]
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            granule: PAGE_BYTES,
        }
    }

    /// As [`HostPages::new`] for memory that the host backs with pages of `granule` bytes,
    /// a power of two: only whole ones can be released.
    ///
    /// # Errors
    /// `InvalidInput` when `granule` is not a power of two of at least [`PAGE_BYTES`].
    pub fn with_granule(memory: GuestMemory, granule: u64) -> io::Result<Self> {
        if !granule.is_power_of_two() || granule < PAGE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("page size {granule} is not a power of two of at least {PAGE_BYTES}"),
            ));
        }
        Ok(Self { memory, granule })
    }

    /// Releases the part of `range` that lies in the region at its start and returns the
    /// rest.
    fn release_first(&self, range: PageRange) -> io::Result<Option<PageRange>> {
        let outside = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{range} is not guest memory"),
            )
        };
        let start = GuestAddress(range.start);
        let region = self.memory.find_region(start).ok_or_else(outside)?;
        let offset = region.to_region_addr(start).ok_or_else(outside)?;
        let left = region.len().saturating_sub(offset.0);
        let bytes = range.bytes().min(left);
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let address = region.get_host_address(offset).map_err(io::Error::other)?;
        let advice = if region.flags() & libc::MAP_TYPE == libc::MAP_PRIVATE {
            libc::MADV_DONTNEED
        } else {
            libc::MADV_REMOVE
        };
        // SAFETY: the region covers `len` bytes from `address` on: `get_host_address`
        // checked the start and `len` is cut to what is left of the region, which stays
        // mapped as long as `self.memory`. Guest memory is only ever accessed through
        // volatile operations, so it may change at any time.
        let done = unsafe { libc::madvise(address.cast(), len, advice) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let rest = range.start.saturating_add(bytes);
        Ok(PageRange::new(rest, range.end.saturating_sub(rest)))
    }
}

impl PageReleaser for HostPages {
    fn release(&self, ranges: &[PageRange]) -> io::Result<()> {
        for range in ranges {
            let mut rest = range.shrink_to(self.granule);
            while let Some(range) = rest {
                rest = self.release_first(range)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap, GuestRegionMmap};

    use super::*;

    fn range(start: u64, bytes: u64) -> PageRange {
        PageRange::new(start, bytes).unwrap()
    }

    /// Two regions with a hole between them, of one file.
    fn shared() -> (GuestMemory, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x20_0000).unwrap();
        let part = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), 0x10_0000, part(0)),
            (GuestAddress(0x10_0000), 0x10_0000, part(0x10_0000)),
        ])
        .unwrap();
        (Arc::new(memory), file)
    }

    fn allocated(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn shared_pages_leave_the_file() {
        let (memory, file) = shared();
        memory
            .write_slice(&vec![1; 0x20_0000], GuestAddress(0))
            .unwrap();
        let before = allocated(&file);
        // Across the border of the regions.
        HostPages::new(Arc::clone(&memory))
            .release(&[range(0x8_0000, 0x10_0000)])
            .unwrap();
        assert_eq!(before - allocated(&file), 0x10_0000);
        let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(read(0x7_ffff), 1);
        assert_eq!(read(0x8_0000), 0);
        assert_eq!(read(0x17_ffff), 0);
        assert_eq!(read(0x18_0000), 1);
    }

    #[test]
    fn private_pages_show_the_template_again_and_leave_it_alone() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x4000]).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mapping = MmapRegionBuilder::<()>::new(0x4000)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
            .build()
            .unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
        memory.write_slice(&[9; 0x4000], GuestAddress(0)).unwrap();
        let before = allocated(&file);
        HostPages::new(Arc::clone(&memory))
            .release(&[range(0x1000, 0x1000)])
            .unwrap();
        let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([read(0), read(0x1000), read(0x2000)], [9, 7, 9]);
        assert_eq!(allocated(&file), before);
    }

    #[test]
    fn only_whole_granules_are_released() {
        let (memory, _file) = shared();
        memory
            .write_slice(&vec![1; 0x20_0000], GuestAddress(0))
            .unwrap();
        let pages = HostPages::with_granule(Arc::clone(&memory), 0x4000).unwrap();
        pages.release(&[range(0x1000, 0x8000)]).unwrap();
        let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            [read(0x3fff), read(0x4000), read(0x7fff), read(0x8000)],
            [1, 0, 0, 1]
        );
        pages.release(&[range(0x1000, 0x2000)]).unwrap();
        HostPages::with_granule(Arc::clone(&memory), 0x3000).unwrap_err();
        HostPages::with_granule(memory, 0x800).unwrap_err();
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let (memory, _file) = shared();
        let pages = HostPages::new(memory);
        pages.release(&[range(0x1f_f000, 0x2000)]).unwrap_err();
        pages
            .release(&[range(u64::MAX - 0x1_ffff, 0x1_0000)])
            .unwrap_err();
        pages.release(&[]).unwrap();
    }

    proptest! {
        /// Coalesced ranges cover the same pages, are sorted, and never touch.
        #[test]
        fn coalescing_keeps_every_page(pages in proptest::collection::vec((0_u64..64, 1_u64..8), 0..32)) {
            let mut ranges: Vec<_> = pages.iter().map(|(start, len)| range(*start, *len)).collect();
            coalesce(&mut ranges);
            for page in 0..80 {
                let before = pages.iter().any(|(start, len)| (*start..start + len).contains(&page));
                let after = ranges.iter().any(|range| (range.start..range.end).contains(&page));
                prop_assert_eq!(before, after);
            }
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }
    }
}
