//! Guest memory on disk, chunk by chunk: which chunks there are, and their digests.
//!
//! A snapshot's memory is a sparse file and a list of the chunks that are not zero. Each has
//! a digest of its own, so that a chunk can be read and checked when it is needed, and two
//! snapshots can be compared without reading either.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek};

/// Unit in which memory is written, compared and digested.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;

/// Bytes of a list's entry: number of the chunk, where it is, its digest.
const ENTRY_BYTES: usize = 40;
const IN_BASE: u32 = 1;

/// Digest of one chunk's content.
type Digest = [u8; 32];

/// A chunk that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Counts chunks from the start of memory.
    number: u32,
    digest: Digest,
    /// The same chunk of the snapshot below has this content, and only that one is on disk.
    pub(crate) in_base: bool,
}

impl Chunk {
    /// Describes `content`, the chunk at `offset`.
    pub(crate) fn of(offset: u64, content: &[u8]) -> io::Result<Self> {
        Ok(Self {
            number: number(offset)?,
            digest: *blake3::hash(content).as_bytes(),
            in_base: false,
        })
    }

    /// Where it lies, in bytes from the start of memory.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.number).saturating_mul(CHUNK_BYTES as u64)
    }

    /// Whether `other` has the same content at the same place.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        self.number == other.number && self.digest == other.digest
    }

    /// Refuses content other than this chunk's.
    pub(crate) fn check(&self, content: &[u8]) -> io::Result<()> {
        if *blake3::hash(content).as_bytes() == self.digest {
            return Ok(());
        }
        Err(invalid(format!(
            "the memory at byte {} does not have its digest",
            self.offset()
        )))
    }
}

/// The chunks of one memory, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChunkList(Vec<Chunk>);

/// Digest of a [`ChunkList`], and so of the memory.
#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryDigest(Digest);

impl MemoryDigest {
    /// Of the memory whose [`ChunkList::to_bytes`] these are.
    pub(crate) fn of_list(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl std::fmt::Debug for MemoryDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

impl ChunkList {
    /// Adds a chunk behind all others.
    pub(crate) fn push(&mut self, chunk: Chunk) {
        debug_assert!(
            self.0.last().is_none_or(|last| last.number < chunk.number),
            "chunks come in order"
        );
        self.0.push(chunk);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.0.iter()
    }

    /// The chunk at `offset`, unless that is zero.
    pub(crate) fn at(&self, offset: u64) -> Option<&Chunk> {
        let number = number(offset).ok()?;
        let found = self.0.binary_search_by_key(&number, |chunk| chunk.number);
        self.0.get(found.ok()?)
    }

    /// Where the first chunk at or after `from` lies; `u64::MAX` when there is none.
    pub(crate) fn next(&self, from: u64) -> u64 {
        let behind = self.0.partition_point(|chunk| chunk.offset() < from);
        self.0.get(behind).map_or(u64::MAX, Chunk::offset)
    }

    /// As the file `chunks` holds it.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len().saturating_mul(ENTRY_BYTES));
        for chunk in &self.0 {
            bytes.extend(chunk.number.to_le_bytes());
            bytes.extend(if chunk.in_base { IN_BASE } else { 0 }.to_le_bytes());
            bytes.extend(chunk.digest);
        }
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote of a memory of `memory_bytes`.
    pub(crate) fn parse(bytes: &[u8], memory_bytes: u64) -> io::Result<Self> {
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() {
            return Err(invalid("the list of chunks was cut short".to_owned()));
        }
        let mut chunks: Vec<Chunk> = Vec::with_capacity(entries.len());
        for entry in entries {
            let (number, rest) = entry.split_first_chunk().unwrap_or((&[0; 4], &[]));
            let (flags, digest) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
            let chunk = Chunk {
                number: u32::from_le_bytes(*number),
                in_base: u32::from_le_bytes(*flags) & IN_BASE != 0,
                digest: digest.try_into().unwrap_or_default(),
            };
            let in_order = chunks.last().is_none_or(|last| last.number < chunk.number);
            if !in_order || chunk.offset() >= memory_bytes {
                return Err(invalid("the list of chunks is not one".to_owned()));
            }
            chunks.push(chunk);
        }
        Ok(Self(chunks))
    }

    /// Most bytes that the list of a memory of `memory_bytes` can have.
    pub(crate) fn max_bytes(memory_bytes: u64) -> u64 {
        memory_bytes
            .div_ceil(CHUNK_BYTES as u64)
            .saturating_mul(ENTRY_BYTES as u64)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Writes chunks of a memory to a file, but those that a snapshot below has as well.
pub(super) struct ChunkWriter<'a> {
    to: &'a File,
    base: Option<&'a ChunkList>,
    list: ChunkList,
}

impl<'a> ChunkWriter<'a> {
    pub(super) fn new(to: &'a File, base: Option<&'a ChunkList>) -> Self {
        Self {
            to,
            base,
            list: ChunkList::default(),
        }
    }

    /// Takes the next chunk, whose content may be zero.
    pub(super) fn add(&mut self, offset: u64, content: &[u8]) -> io::Result<()> {
        if is_zero(content) {
            return Ok(());
        }
        let chunk = Chunk::of(offset, content)?;
        if !self.add_known(chunk) {
            self.to.write_all_at(content, offset)?;
            self.list.push(chunk);
        }
        Ok(())
    }

    /// Takes the next chunk without its content, if the snapshot below has it.
    pub(super) fn add_known(&mut self, chunk: Chunk) -> bool {
        let below = self.base.and_then(|base| base.at(chunk.offset()));
        let known = below.is_some_and(|below| below.equals(&chunk));
        if known {
            self.list.push(Chunk {
                in_base: true,
                ..chunk
            });
        }
        known
    }

    /// The list of what was taken; `bytes` is the size of the memory.
    pub(super) fn finish(self, bytes: u64) -> io::Result<ChunkList> {
        self.to.set_len(bytes)?;
        Ok(self.list)
    }
}

/// Calls `each` with every chunk of the first `bytes` of `file` that is not a hole, in order.
pub(super) fn for_each_chunk(
    file: &File,
    bytes: u64,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = next_data(file, 0)?;
    while offset < bytes {
        let Some(chunk) = buffer.get_mut(..chunk_len(offset, bytes)) else {
            break;
        };
        file.read_exact_at(chunk, offset)?;
        each(offset, chunk)?;
        offset = next_data(file, offset.saturating_add(CHUNK_BYTES as u64))?;
    }
    Ok(())
}

/// Start of the chunk that `offset` lies in.
pub(super) fn chunk_start(offset: u64) -> u64 {
    let within = offset.checked_rem(CHUNK_BYTES as u64).unwrap_or(0);
    offset.saturating_sub(within)
}

/// Bytes of the chunk at `offset` of a memory of `bytes`.
pub(super) fn chunk_len(offset: u64, bytes: u64) -> usize {
    let left = bytes.saturating_sub(offset);
    usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES)
}

/// The chunk with the first data at or after `from`; `u64::MAX` when there is none.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<u64> {
    let position = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file, position, Whence::SeekData) {
        Ok(data) => Ok(chunk_start(u64::try_from(data).map_err(io::Error::other)?)),
        Err(nix::errno::Errno::ENXIO) => Ok(u64::MAX),
        // A file system that cannot tell holes.
        Err(nix::errno::Errno::EINVAL) => Ok(from),
        Err(err) => Err(err.into()),
    }
}

pub(super) fn is_zero(chunk: &[u8]) -> bool {
    // Compares memory with itself, one step on: as fast as memcmp.
    chunk.first().is_none_or(|&first| first == 0)
        && chunk.get(1..).unwrap_or_default()
            == chunk
                .get(..chunk.len().saturating_sub(1))
                .unwrap_or_default()
}

fn number(offset: u64) -> io::Result<u32> {
    let number = offset.checked_div(CHUNK_BYTES as u64).unwrap_or(0);
    u32::try_from(number).map_err(io::Error::other)
}

pub(super) fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = CHUNK_BYTES as u64;

    fn list(offsets: &[u64]) -> ChunkList {
        let mut list = ChunkList::default();
        for offset in offsets {
            list.push(Chunk::of(*offset, &offset.to_le_bytes()).unwrap());
        }
        list
    }

    #[test]
    fn a_list_survives_its_file() {
        let mut chunks = list(&[0, CHUNK, 9 * CHUNK]);
        chunks.0[1].in_base = true;
        let bytes = chunks.to_bytes();
        assert_eq!(ChunkList::parse(&bytes, 10 * CHUNK).unwrap(), chunks);
        assert!(bytes.len() as u64 <= ChunkList::max_bytes(10 * CHUNK));
        assert_eq!(chunks.at(9 * CHUNK + 5), Some(&chunks.0[2]));
        assert_eq!(chunks.at(8 * CHUNK), None);
        let next = [0, 1, CHUNK, CHUNK + 1, 10 * CHUNK].map(|from| chunks.next(from));
        assert_eq!(next, [0, CHUNK, CHUNK, 9 * CHUNK, u64::MAX]);
    }

    #[test]
    fn damaged_lists_are_refused() {
        let bytes = list(&[0, CHUNK]).to_bytes();
        let refused = |bytes: &[u8], memory| ChunkList::parse(bytes, memory).unwrap_err();
        refused(&bytes[..bytes.len() - 1], 2 * CHUNK);
        refused(&bytes, CHUNK);
        let swapped = [&bytes[ENTRY_BYTES..], &bytes[..ENTRY_BYTES]].concat();
        refused(&swapped, 2 * CHUNK);
        refused(&bytes.repeat(2), 2 * CHUNK);
    }

    #[test]
    fn only_what_differs_from_the_base_is_written() {
        let file = tempfile::tempfile().unwrap();
        let content = |byte| vec![byte; CHUNK_BYTES];
        let mut writer = ChunkWriter::new(&file, None);
        for byte in [1, 2, 0] {
            writer.add(u64::from(byte) * CHUNK, &content(byte)).unwrap();
        }
        let base = writer.finish(4 * CHUNK).unwrap();
        assert_eq!(base.len(), 2);
        let diff = tempfile::tempfile().unwrap();
        let mut writer = ChunkWriter::new(&diff, Some(&base));
        writer.add(CHUNK, &content(1)).unwrap();
        writer.add(2 * CHUNK, &content(7)).unwrap();
        writer.add(3 * CHUNK, &content(2)).unwrap();
        let list = writer.finish(4 * CHUNK).unwrap();
        let in_base: Vec<_> = list.iter().map(|chunk| chunk.in_base).collect();
        assert_eq!(in_base, [true, false, false]);
        assert_eq!(next_data(&diff, 0).unwrap(), 2 * CHUNK);
    }
}
