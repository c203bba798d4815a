//! The pages of a clone that it does not share with its image (proc(5), pagemap).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use devices::virtio::GuestMemory;
use devices::virtio::release::PAGE_BYTES;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use super::chunks::{CHUNK_BYTES, ChunkList, ChunkWriter, chunk_start};
use super::{MemoryImage, RamSize, ram_regions};

/// Pages looked at in one read.
const PAGES: usize = 8192;
const ENTRY_BYTES: usize = 8;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of the file, not a copy of it.
const OF_FILE: u64 = 1 << 61;

/// Calls `each` with the guest-physical address of every page of its own.
pub(super) fn for_each_page(
    memory: &GuestMemory,
    mut each: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; PAGES.saturating_mul(ENTRY_BYTES)];
    for region in memory.iter() {
        let first = (region.as_ptr().addr() as u64)
            .checked_div(PAGE_BYTES)
            .unwrap_or(0);
        let pages = region.len().checked_div(PAGE_BYTES).unwrap_or(0);
        let mut done = 0;
        while done < pages {
            let count = usize::try_from(pages.saturating_sub(done))
                .unwrap_or(PAGES)
                .min(PAGES);
            let Some(window) = entries.get_mut(..count.saturating_mul(ENTRY_BYTES)) else {
                break;
            };
            let position = first
                .saturating_add(done)
                .saturating_mul(ENTRY_BYTES as u64);
            pagemap.read_exact_at(window, position)?;
            for (page, entry) in (done..).zip(window.as_chunks::<ENTRY_BYTES>().0) {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    let offset = page.saturating_mul(PAGE_BYTES);
                    each(region.start_addr().0.saturating_add(offset))?;
                }
            }
            done = done.saturating_add(count as u64);
        }
    }
    Ok(())
}

/// How much memory they take.
pub(super) fn bytes(memory: &GuestMemory) -> io::Result<u64> {
    let mut bytes = 0_u64;
    for_each_page(memory, |_| {
        bytes = bytes.saturating_add(PAGE_BYTES);
        Ok(())
    })?;
    Ok(bytes)
}

/// Writes the memory of a clone of `image`: what it has written, and the image's content
/// elsewhere. The image is read by itself: reading its holes through the mapping would
/// allocate pages. Chunks of it that `base` has too are not read at all.
pub(super) fn write(
    memory: &GuestMemory,
    image: &MemoryImage,
    to: &File,
    base: Option<&ChunkList>,
) -> io::Result<ChunkList> {
    let size = image.size();
    let bytes = size.total_bytes();
    // By chunk: where its own pages lie, in the guest and in the file.
    let mut own: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
    for_each_page(memory, |address| {
        let offset = file_offset(address, size)
            .ok_or_else(|| io::Error::other("a page outside of guest memory"))?;
        let pages = own.entry(chunk_start(offset)).or_default();
        pages.push((address, offset));
        Ok(())
    })?;
    let mut writer = ChunkWriter::new(to, base);
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut shared = image.next_chunk(0)?;
    loop {
        let next = own.first_key_value().map_or(u64::MAX, |(chunk, _)| *chunk);
        let offset = shared.min(next);
        if offset >= bytes {
            break;
        }
        let pages = own.remove(&offset).unwrap_or_default();
        let known = image.chunks().and_then(|chunks| chunks.at(offset));
        let unchanged = known.filter(|_| pages.is_empty());
        if !unchanged.is_some_and(|chunk| writer.add_known(*chunk)) {
            let content = image.read_chunk(offset, &mut buffer)?;
            for (address, at) in pages {
                let start = usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
                let end = start.saturating_add(usize::try_from(PAGE_BYTES).unwrap_or(0));
                if let Some(page) = content.get_mut(start..end) {
                    memory
                        .read_slice(page, GuestAddress(address))
                        .map_err(io::Error::other)?;
                }
            }
            writer.add(offset, content)?;
        }
        if shared == offset {
            shared = image.next_chunk(offset.saturating_add(CHUNK_BYTES as u64))?;
        }
    }
    writer.finish(bytes)
}

/// Where guest memory keeps the page at `address`.
fn file_offset(address: u64, size: RamSize) -> Option<u64> {
    ram_regions(size).find_map(|region| {
        let within = address.checked_sub(region.start)?;
        (within < region.bytes).then(|| region.file_offset.saturating_add(within))
    })
}
