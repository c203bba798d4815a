//! Guest memory in the files of a snapshot and of the snapshots below it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::RamSize;
use super::chunks::{Chunk, ChunkList, chunk_len, invalid};

/// Memory that is read from disk chunk by chunk, each checked when it is read.
#[derive(Debug)]
pub(crate) struct StoredMemory {
    chunks: Arc<ChunkList>,
    size: RamSize,
    file: File,
    /// Where chunks are that this one leaves out.
    base: Option<Arc<StoredMemory>>,
}

impl StoredMemory {
    /// Memory of this size in `file`, over `base`.
    ///
    /// # Errors
    /// The file has another size, or chunks are to be in a base that does not have them.
    pub(crate) fn new(
        file: File,
        size: RamSize,
        chunks: ChunkList,
        base: Option<Arc<Self>>,
    ) -> io::Result<Self> {
        let (found, bytes) = (file.metadata()?.len(), size.total_bytes());
        if found != bytes {
            return Err(invalid(format!(
                "the memory file has {found} bytes instead of {bytes}"
            )));
        }
        for chunk in chunks.iter().filter(|chunk| chunk.in_base) {
            let below = base.as_ref().and_then(|base| base.chunk(chunk.offset()));
            if !below.is_some_and(|below| below.equals(chunk)) {
                return Err(invalid(
                    "the snapshot below is not the one that this was made over".to_owned(),
                ));
            }
        }
        Ok(Self {
            chunks: Arc::new(chunks),
            size,
            file,
            base,
        })
    }

    pub(crate) fn chunks(&self) -> &Arc<ChunkList> {
        &self.chunks
    }

    pub(crate) fn size(&self) -> RamSize {
        self.size
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.size.total_bytes()
    }

    /// The chunk at `offset`, unless that is zero.
    pub(crate) fn chunk(&self, offset: u64) -> Option<&Chunk> {
        self.chunks.at(offset)
    }

    /// Reads `chunk` of this memory into the beginning of `buffer`, of
    /// [`super::chunks::CHUNK_BYTES`], and returns that part.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub(crate) fn read<'b>(&self, chunk: &Chunk, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let content = buffer
            .get_mut(..chunk_len(chunk.offset(), self.bytes()))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut holder = self;
        let mut place = Some(chunk);
        while let (Some(Chunk { in_base: true, .. }), Some(base)) = (place, &holder.base) {
            place = base.chunk(chunk.offset());
            holder = base;
        }
        holder.file.read_exact_at(content, chunk.offset())?;
        chunk.check(content)?;
        Ok(content)
    }
}
