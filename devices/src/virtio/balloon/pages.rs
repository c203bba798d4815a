//! The pages that a descriptor chain names.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::GuestMemory;
use crate::virtio::chain::Outside;
use crate::virtio::release::{PAGE_BYTES, PageRange, coalesce};
use crate::virtio::serve::{Descriptors, ServeError};

/// Most page numbers taken from one inflate chain; Linux sends 256. More are ignored: the
/// guest then gives back less than it says.
pub const MAX_PFNS_PER_CHAIN: usize = 1024;
/// Most reported ranges taken from one chain; Linux sends 32.
pub const MAX_RANGES_PER_CHAIN: usize = 256;

/// Bytes of a page number: 32 bits, in units of 4 KiB whatever the guest's page size.
const PFN_BYTES: usize = 4;
/// Page numbers read at a time.
const PIECE: usize = 128;

/// Pages named by number in the readable buffers (5.5.6), coalesced and checked.
pub(super) fn numbered(
    memory: &GuestMemory,
    chain: Descriptors<'_>,
) -> Result<Vec<PageRange>, ServeError> {
    let mut ranges = Vec::new();
    for descriptor in chain.readable() {
        let count = usize::try_from(descriptor.len()).unwrap_or(usize::MAX) / PFN_BYTES;
        let room = MAX_PFNS_PER_CHAIN.saturating_sub(ranges.len());
        read_numbers(memory, descriptor.addr(), count.min(room), &mut ranges)?;
    }
    coalesce(&mut ranges);
    check(memory, &ranges)?;
    Ok(ranges)
}

fn read_numbers(
    memory: &GuestMemoryMmap<()>,
    mut address: GuestAddress,
    mut count: usize,
    ranges: &mut Vec<PageRange>,
) -> Result<(), ServeError> {
    let mut piece = [0; PIECE * PFN_BYTES];
    while count > 0 {
        let now = count.min(PIECE);
        let bytes = piece
            .get_mut(..now.saturating_mul(PFN_BYTES))
            .unwrap_or_default();
        memory.read_slice(bytes, address).map_err(|_| Outside)?;
        let (numbers, _) = bytes.as_chunks::<PFN_BYTES>();
        ranges.extend(numbers.iter().filter_map(|number| {
            let start = u64::from(u32::from_le_bytes(*number)).saturating_mul(PAGE_BYTES);
            PageRange::new(start, PAGE_BYTES)
        }));
        // Wraps only past memory, where the next read fails.
        address = GuestAddress(address.0.wrapping_add(bytes.len() as u64));
        count = count.saturating_sub(now);
    }
    Ok(())
}

/// Pages that the writable buffers themselves are (5.5.6.7), coalesced and checked. Parts
/// of a page at their ends are left out.
pub(super) fn reported(
    memory: &GuestMemory,
    chain: Descriptors<'_>,
) -> Result<Vec<PageRange>, ServeError> {
    let mut ranges: Vec<_> = chain
        .writable()
        .take(MAX_RANGES_PER_CHAIN)
        .filter_map(|descriptor| {
            PageRange::new(descriptor.addr().0, u64::from(descriptor.len()))?.shrink_to(PAGE_BYTES)
        })
        .collect();
    coalesce(&mut ranges);
    check(memory, &ranges)?;
    Ok(ranges)
}

fn check(memory: &GuestMemory, ranges: &[PageRange]) -> Result<(), ServeError> {
    match ranges.iter().find(|range| !range.is_in(memory)) {
        None => Ok(()),
        Some(range) => Err(ServeError::Request(format!(
            "pages {range} are not guest memory"
        ))),
    }
}
