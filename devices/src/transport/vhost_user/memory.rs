use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::virtio::GuestMemory;

/// Most regions of guest memory: a PC has a handful, each plugged DIMM adds one.
pub(super) const MAX_REGIONS: usize = 32;

/// Why guest memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("{0} regions, at most {MAX_REGIONS} are served")]
    TooMany(usize),
    #[error("region {index}: size {size:#x} or offset {offset:#x} does not fit this host")]
    Range {
        index: usize,
        size: u64,
        offset: u64,
    },
    #[error("region {index}: its file cannot be read: {source}")]
    File {
        index: usize,
        source: std::io::Error,
    },
    #[error("region {index}: {source}")]
    Map {
        index: usize,
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("region {index} ends past the last address")]
    Address { index: usize },
    #[error("regions overlap: {0}")]
    Overlap(#[source] vm_memory::GuestRegionCollectionError),
    #[error("there is no region at {0:#x} of that size")]
    NoRegion(u64),
}

/// Where one region of guest memory is in the front-end's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    guest: u64,
    user: u64,
    size: u64,
}

/// Guest memory as the front-end last described it.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<(Place, Arc<GuestRegionMmap<()>>)>,
}

impl MemoryTable {
    /// Maps the regions; each is backed by the file of the same position.
    pub(super) fn new(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        let mut table = Self::default();
        for (region, file) in regions.iter().zip(files) {
            table.add(region, file)?;
        }
        table.memory()?;
        Ok(table)
    }

    /// Maps one more region.
    pub(super) fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(), MemoryError> {
        let index = self.regions.len();
        if index >= MAX_REGIONS {
            return Err(MemoryError::TooMany(index.saturating_add(1)));
        }
        let (size, offset) = (region.memory_size, region.mmap_offset);
        let bad_range = || MemoryError::Range {
            index,
            size,
            offset,
        };
        let end = offset.checked_add(size).ok_or_else(bad_range)?;
        // A read tells a memory file from what cannot be mapped without faults later; its
        // length is checked when it is mapped.
        let mut last = [0];
        let last_at = end.checked_sub(1).ok_or_else(bad_range)?;
        file.read_exact_at(&mut last, last_at)
            .map_err(|source| MemoryError::File { index, source })?;
        let bytes = usize::try_from(size).map_err(|_| bad_range())?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), bytes)
            .map_err(|source| MemoryError::Map { index, source })?;
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr))
            .ok_or(MemoryError::Address { index })?;
        let place = Place {
            guest: region.guest_phys_addr,
            user: region.user_addr,
            size,
        };
        self.regions.push((place, Arc::new(mapped)));
        Ok(())
    }

    /// Unmaps the region that was added with these addresses.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), MemoryError> {
        let gone = Place {
            guest: region.guest_phys_addr,
            user: region.user_addr,
            size: region.memory_size,
        };
        let at = self.regions.iter().position(|(place, _)| *place == gone);
        let at = at.ok_or(MemoryError::NoRegion(gone.guest))?;
        self.regions.remove(at);
        Ok(())
    }

    /// All regions as guest memory.
    pub(super) fn memory(&self) -> Result<GuestMemory, MemoryError> {
        let mut regions: Vec<_> = self
            .regions
            .iter()
            .map(|(place, region)| (place.guest, Arc::clone(region)))
            .collect();
        regions.sort_by_key(|(guest, _)| *guest);
        let regions = regions.into_iter().map(|(_, region)| region).collect();
        GuestMemoryMmap::from_arc_regions(regions)
            .map(Arc::new)
            .map_err(MemoryError::Overlap)
    }

    /// The guest's address of what the front-end has at `user`.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|(place, _)| {
            let offset = user.checked_sub(place.user)?;
            (offset < place.size).then(|| place.guest.checked_add(offset))?
        })
    }
}
