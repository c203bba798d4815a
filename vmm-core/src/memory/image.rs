//! Guest memory as it was at one moment: what clones start from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::chunks::{CHUNK_BYTES, ChunkList, ChunkWriter, chunk_len, for_each_chunk, next_data};
use super::stored::StoredMemory;
use super::{Backing, GuestRam, Lazy, RamSize, sealable_memfd};
use crate::thread::VmThreads;

/// Memory that nobody changes any more. Clones share it.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    content: Content,
    size: RamSize,
}

#[derive(Clone, Debug)]
enum Content {
    /// A sealed memfd. The list is known once it was read or written.
    Sealed(Arc<File>, Arc<OnceLock<Arc<ChunkList>>>),
    /// Files that are read when a guest needs them.
    Stored(Arc<StoredMemory>),
}

impl MemoryImage {
    /// Takes the memory of a machine that has ended: no other mapping of it may be left.
    ///
    /// # Errors
    /// When something still maps it for writing, or it is a clone's.
    pub(crate) fn of(ram: GuestRam) -> io::Result<Self> {
        let Backing::Own { file, .. } = ram.backing.clone() else {
            return Err(io::Error::other(
                "the memory of a clone cannot become an image",
            ));
        };
        let size = ram.size;
        drop(ram);
        seal(&file)?;
        Ok(Self {
            content: Content::Sealed(file, Arc::default()),
            size,
        })
    }

    /// Reads all of `stored` into memory of this process: what happens to its files later
    /// concerns no clone.
    ///
    /// # Errors
    /// When a chunk cannot be read or is not what was written, or the host has no memory
    /// for it.
    pub(crate) fn load(stored: &StoredMemory) -> io::Result<Self> {
        let file = sealable_memfd("template", stored.bytes(), false)?;
        let mut buffer = vec![0; CHUNK_BYTES];
        for chunk in stored.chunks().iter() {
            file.write_all_at(stored.read(chunk, &mut buffer)?, chunk.offset())?;
        }
        seal(&file)?;
        Ok(Self {
            content: Content::Sealed(
                Arc::new(file),
                Arc::new(OnceLock::from(Arc::clone(stored.chunks()))),
            ),
            size: stored.size(),
        })
    }

    /// Leaves `stored` on disk: each clone reads what its guest needs when it does.
    pub(crate) fn open(stored: StoredMemory) -> Self {
        Self {
            size: stored.size(),
            content: Content::Stored(Arc::new(stored)),
        }
    }

    /// Writes the image to an empty file, leaving holes where memory is zero.
    ///
    /// # Errors
    /// As the file's writes.
    pub(crate) fn write_to(&self, to: &File) -> io::Result<ChunkList> {
        let mut writer = ChunkWriter::new(to, None);
        self.for_each_chunk(|offset, chunk| writer.add(offset, chunk))?;
        let list = writer.finish(self.size.total_bytes())?;
        if let Content::Sealed(_, known) = &self.content {
            known.get_or_init(|| Arc::new(list.clone()));
        }
        Ok(list)
    }

    fn for_each_chunk(&self, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        match &self.content {
            Content::Sealed(file, _) => for_each_chunk(file, self.size.total_bytes(), each),
            Content::Stored(stored) => {
                let mut buffer = vec![0; CHUNK_BYTES];
                for chunk in stored.chunks().iter() {
                    each(chunk.offset(), stored.read(chunk, &mut buffer)?)?;
                }
                Ok(())
            }
        }
    }

    /// The chunks that are not zero, if they are known.
    pub(super) fn chunks(&self) -> Option<&ChunkList> {
        match &self.content {
            Content::Sealed(_, known) => known.get().map(|list| &**list),
            Content::Stored(stored) => Some(stored.chunks()),
        }
    }

    /// The first chunk at or after `from` that may not be zero; `u64::MAX` when there is none.
    pub(super) fn next_chunk(&self, from: u64) -> io::Result<u64> {
        match &self.content {
            Content::Sealed(file, _) => next_data(file, from),
            Content::Stored(stored) => Ok(stored.chunks().next(from)),
        }
    }

    /// Reads the chunk at `offset` into the beginning of `buffer` and returns that part.
    pub(super) fn read_chunk<'b>(
        &self,
        offset: u64,
        buffer: &'b mut [u8],
    ) -> io::Result<&'b mut [u8]> {
        let len = chunk_len(offset, self.size.total_bytes());
        match &self.content {
            Content::Sealed(file, _) => {
                let chunk = buffer.get_mut(..len).ok_or(io::ErrorKind::InvalidInput)?;
                file.read_exact_at(chunk, offset)?;
            }
            Content::Stored(stored) => match stored.chunk(offset) {
                Some(chunk) => {
                    stored.read(chunk, buffer)?;
                }
                None => buffer.fill(0),
            },
        }
        buffer
            .get_mut(..len)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Memory for a clone: pages are shared with the image until they are written, or read
    /// from its files when they are first touched, by a thread of `threads`.
    ///
    /// # Errors
    /// When the host cannot map it, or has no userfaultfd for files.
    pub(crate) fn clone_memory(&self, threads: &VmThreads) -> io::Result<GuestRam> {
        let mut ram = GuestRam::map(Backing::Image(self.clone()), self.size)?;
        if let Content::Stored(stored) = &self.content {
            ram.lazy = Some(Arc::new(Lazy::start(&ram.mapped, stored, threads)?));
        }
        Ok(ram)
    }

    /// What to map; nothing for files, which are not mapped.
    pub(super) fn memfd(&self) -> Option<&Arc<File>> {
        match &self.content {
            Content::Sealed(file, _) => Some(file),
            Content::Stored(_) => None,
        }
    }

    pub(super) fn size(&self) -> RamSize {
        self.size
    }

    /// Bytes that host pages back, for all clones together.
    ///
    /// # Errors
    /// When the memfd cannot be examined.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.memfd()
            .map_or(Ok(0), |file| super::allocated_bytes(file))
    }
}

#[cfg(test)]
impl MemoryImage {
    /// Tries every way to a change.
    pub(crate) fn try_to_change(&self) {
        use std::os::fd::AsRawFd;
        let denied = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        };
        let file = self.memfd().unwrap();
        denied(file.write_all_at(&[1], 0));
        denied(file.set_len(4096));
        denied(file.set_len(self.size.total_bytes() * 2));
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = File::options().write(true).open(link).unwrap();
        denied(again.write_all_at(&[1], 0));
        let region = vm_memory::mmap::MmapRegion::<()>::build(
            Some(vm_memory::FileOffset::from_arc(Arc::clone(file), 0)),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        );
        assert!(region.is_err(), "mapped shared and writable");
        denied(punch(file));
    }
}

#[cfg(test)]
fn punch(file: &File) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, 0, 4096)?)
}

/// No size change, no write and no further seal from now on.
fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}
