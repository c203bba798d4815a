//! Guest memory as it was at one moment: what clones start from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::unistd::{Whence, lseek};

use super::{Backing, GuestRam, sealable_memfd};

/// Unit in which images are written, compared with zero and digested.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;

/// Memory that nobody can change any more, in a sealed memfd. Clones share it.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    file: Arc<File>,
    bytes: u64,
}

/// Digest of an image's content, wherever it is stored and however sparse.
#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryDigest([u8; 32]);

impl std::fmt::Debug for MemoryDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

impl MemoryImage {
    /// Takes the memory of a machine that has ended: no other mapping of it may be left.
    ///
    /// # Errors
    /// When something still maps it for writing, or it is a clone's.
    pub(crate) fn of(ram: GuestRam) -> io::Result<Self> {
        let Backing::Own(file) = ram.backing.clone() else {
            return Err(io::Error::other(
                "the memory of a clone cannot become an image",
            ));
        };
        let bytes = ram.bytes;
        drop(ram);
        seal(&file)?;
        Ok(Self { file, bytes })
    }

    /// Reads an image of `bytes` that [`Self::write_to`] wrote, into memory of its own: what
    /// happens to the file later concerns no clone.
    ///
    /// # Errors
    /// When the file is shorter or longer, its content does not have `digest`, or the host
    /// has no memory for it.
    pub(crate) fn read_from(from: &File, bytes: u64, digest: MemoryDigest) -> io::Result<Self> {
        let found = from.metadata()?.len();
        if found != bytes {
            return Err(invalid(format!(
                "the memory file has {found} bytes instead of {bytes}"
            )));
        }
        let file = sealable_memfd("template", bytes)?;
        if write(from, bytes, &file)? != digest {
            return Err(invalid(
                "the content of the memory file does not have its digest".to_owned(),
            ));
        }
        seal(&file)?;
        Ok(Self {
            file: Arc::new(file),
            bytes,
        })
    }

    /// Writes the image to an empty file, leaving holes where memory is zero.
    ///
    /// # Errors
    /// As the file's writes.
    pub(crate) fn write_to(&self, to: &File) -> io::Result<MemoryDigest> {
        write(&self.file, self.bytes, to)
    }

    /// Memory for a clone: pages are shared with the image until they are written.
    ///
    /// # Errors
    /// When the host cannot map it.
    pub(crate) fn clone_memory(&self) -> io::Result<GuestRam> {
        GuestRam::map(Backing::Image(Arc::clone(&self.file)), self.bytes)
    }

    /// Size of the guest's memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that host pages back, for all clones together.
    ///
    /// # Errors
    /// When the memfd cannot be examined.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        super::allocated_bytes(&self.file)
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
        denied(self.file.write_all_at(&[1], 0));
        denied(self.file.set_len(4096));
        denied(self.file.set_len(self.bytes * 2));
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let again = File::options().write(true).open(link).unwrap();
        denied(again.write_all_at(&[1], 0));
        let region = vm_memory::mmap::MmapRegion::<()>::build(
            Some(vm_memory::FileOffset::from_arc(Arc::clone(&self.file), 0)),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        );
        assert!(region.is_err(), "mapped shared and writable");
        denied(punch(&self.file));
    }
}

#[cfg(test)]
fn punch(file: &File) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, 0, 4096)?)
}

/// Digests the chunks of an image that are not zero.
#[derive(Debug, Default)]
pub(crate) struct Hasher(blake3::Hasher);

impl Hasher {
    pub(crate) fn add(&mut self, offset: u64, chunk: &[u8]) {
        self.0.update(&offset.to_le_bytes());
        self.0.update(chunk);
    }

    pub(crate) fn finish(&self) -> MemoryDigest {
        MemoryDigest(*self.0.finalize().as_bytes())
    }
}

/// Copies what is not zero in the first `bytes` of `from`.
pub(super) fn write(from: &File, bytes: u64, to: &File) -> io::Result<MemoryDigest> {
    let mut hasher = Hasher::default();
    for_each_chunk(from, bytes, |offset, chunk| {
        hasher.add(offset, chunk);
        to.write_all_at(chunk, offset)
    })?;
    to.set_len(bytes)?;
    Ok(hasher.finish())
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

/// Calls `each` with every chunk of the first `bytes` of `file` that is not all zero, in
/// order. Holes are not read.
pub(crate) fn for_each_chunk(
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
        if !is_zero(chunk) {
            each(offset, chunk)?;
        }
        offset = next_data(file, offset.saturating_add(CHUNK_BYTES as u64))?;
    }
    Ok(())
}

/// Bytes of the chunk at `offset` of a file of `bytes`.
pub(super) fn chunk_len(offset: u64, bytes: u64) -> usize {
    let left = bytes.saturating_sub(offset);
    usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES)
}

/// The chunk with the first data at or after `from`; `u64::MAX` when there is none.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<u64> {
    let position = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file, position, Whence::SeekData) {
        Ok(data) => {
            let data = u64::try_from(data).map_err(io::Error::other)?;
            let within = data.checked_rem(CHUNK_BYTES as u64).unwrap_or(0);
            Ok(data.saturating_sub(within))
        }
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

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
