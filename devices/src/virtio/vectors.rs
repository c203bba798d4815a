//! Guest memory as the kernel's scatter/gather list: I/O between a file and the guest
//! without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory as _};

use super::GuestMemory;
use super::chain::{Outside, Parts};

/// Most entries the kernel takes in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// Runs of mapped guest memory. Keeps the mapping alive; reusable.
pub(crate) struct GuestVectors {
    memory: GuestMemory,
    vectors: Vec<libc::iovec>,
    /// Entries before this one are done.
    first: usize,
    bytes: usize,
}

// SAFETY: the pointers in `vectors` are into the mapping that `memory`, itself `Send` and
// `Sync`, keeps alive, and only the kernel follows them.
unsafe impl Send for GuestVectors {}

impl std::fmt::Debug for GuestVectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestVectors")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl GuestVectors {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        Self {
            memory: Arc::clone(memory),
            vectors: Vec::new(),
            first: 0,
            bytes: 0,
        }
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Runs of memory left.
    pub(crate) fn runs(&self) -> usize {
        self.left().len()
    }

    /// Forgets what was transferred, so that there is room to append.
    pub(crate) fn compact(&mut self) {
        self.vectors.drain(..self.first.min(self.vectors.len()));
        self.first = 0;
    }

    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.first = 0;
        self.bytes = 0;
    }

    /// Adds the bytes of `parts`; the list must be cleared after an error.
    pub(crate) fn append(&mut self, parts: &Parts) -> Result<(), Outside> {
        for part in parts.iter() {
            self.push(part.addr, part.len)?;
        }
        Ok(())
    }

    fn push(&mut self, addr: GuestAddress, len: usize) -> Result<(), Outside> {
        for slice in self.memory.get_slices(addr, len) {
            let slice = slice.map_err(|_| Outside)?;
            if self.vectors.len() == MAX_VECTORS {
                return Err(Outside);
            }
            self.vectors.push(libc::iovec {
                // The guard of a plain mapping maps nothing: the pointer outlives it.
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.bytes = self.bytes.saturating_add(slice.len());
        }
        Ok(())
    }

    /// Marks the first `done` bytes as transferred.
    pub(crate) fn advance(&mut self, done: usize) {
        let mut left = done.min(self.bytes);
        self.bytes = self.bytes.saturating_sub(left);
        for vector in self.vectors.iter_mut().skip(self.first) {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(left).cast();
                vector.iov_len = vector.iov_len.saturating_sub(left);
                return;
            }
            left = left.saturating_sub(vector.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }

    /// What is left, for io_uring: valid while `self` lives and is not changed.
    pub(crate) fn raw(&self) -> (*const libc::iovec, u32) {
        let left = self.left();
        // At most `MAX_VECTORS`.
        (left.as_ptr(), u32::try_from(left.len()).unwrap_or(0))
    }

    fn left(&self) -> &[libc::iovec] {
        self.vectors.get(self.first..).unwrap_or_default()
    }

    /// preadv(2) into what is left.
    pub(crate) fn read_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (vectors, count) = self.raw_call();
        let offset = file_offset(offset)?;
        // SAFETY: `count` vectors lie in guest memory that `self.memory` keeps mapped; the
        // guest may change it at any time, and nobody else holds references into it.
        retry(|| unsafe { libc::preadv64(fd.as_raw_fd(), vectors, count, offset) })
    }

    /// pwritev2(2) of what is left, to stable storage when `durable`.
    pub(crate) fn write_at(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        durable: bool,
    ) -> io::Result<usize> {
        let (vectors, count) = self.raw_call();
        let offset = file_offset(offset)?;
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: as in `read_at`; the kernel only reads the vectors.
        retry(|| unsafe { libc::pwritev2(fd.as_raw_fd(), vectors, count, offset, flags) })
    }

    /// writev(2) of what is left.
    pub(crate) fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (vectors, count) = self.raw_call();
        // SAFETY: as in `read_at`; the kernel only reads the vectors.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), vectors, count) })
    }

    /// readv(2) into what is left, and what does not fit there into `overflow`.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>, overflow: &mut [u8]) -> io::Result<usize> {
        self.vectors.push(libc::iovec {
            iov_base: overflow.as_mut_ptr().cast(),
            iov_len: overflow.len(),
        });
        let (vectors, count) = self.raw_call();
        // SAFETY: as in `read_at`; the last vector is `overflow`, borrowed for the call.
        let done = retry(|| unsafe { libc::readv(fd.as_raw_fd(), vectors, count) });
        // No pointer to `overflow` survives the call.
        self.vectors.pop();
        done
    }

    fn raw_call(&self) -> (*const libc::iovec, libc::c_int) {
        let left = self.left();
        let count = left.len().min(MAX_VECTORS);
        (left.as_ptr(), libc::c_int::try_from(count).unwrap_or(0))
    }
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let err = io::Error::last_os_error();
        if err.kind() != io::ErrorKind::Interrupted {
            return Err(err);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::virtio::chain::Chain;

    /// Two regions that touch, so that a buffer can span them.
    fn memory() -> GuestMemory {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn vectors(memory: &GuestMemory, parts: &[(u64, u32)]) -> Result<GuestVectors, Outside> {
        let mut chain = Chain::default();
        let last = parts.len() - 1;
        let descriptors = parts
            .iter()
            .enumerate()
            .map(|(index, &(addr, len))| Descriptor::new(addr, len, u16::from(index < last), 0));
        chain.load(descriptors, usize::MAX).unwrap();
        let mut vectors = GuestVectors::new(memory);
        vectors.append(&chain.readable).map(|()| vectors)
    }

    #[test]
    fn files_are_read_and_written_across_regions() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut into = vectors(&memory, &[(0x20, 2), (0xfffe, 4)]).unwrap();
        assert_eq!(into.len(), 6);
        assert_eq!(into.read_at(file.as_fd(), 3).unwrap(), 6);
        let mut seen = [0; 4];
        memory.read_slice(&mut seen, GuestAddress(0xfffe)).unwrap();
        assert_eq!(&seen, b"5678");
        into.advance(3);
        assert_eq!(into.len(), 3);
        assert_eq!(into.write_at(file.as_fd(), 100, true).unwrap(), 3);
        let mut back = [0; 3];
        file.read_exact_at(&mut back, 100).unwrap();
        assert_eq!(&back, b"678");
        into.advance(usize::MAX);
        assert_eq!(into.len(), 0);
    }

    #[test]
    fn what_does_not_fit_overflows() {
        let memory = memory();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"abcdef").unwrap();
        let mut into = vectors(&memory, &[(0, 4)]).unwrap();
        let mut overflow = [0; 8];
        assert_eq!(into.read(reader.as_fd(), &mut overflow).unwrap(), 6);
        assert_eq!(&overflow[..3], b"ef\0");
        assert_eq!(into.len(), 4);
        assert_eq!(into.left().len(), 1);
    }

    #[test]
    fn only_guest_memory_gets_in() {
        let memory = memory();
        for part in [(0x1_fff0, 0x20), (0x2_0000, 1), (u64::MAX, 1)] {
            assert_eq!(vectors(&memory, &[part]).unwrap_err(), Outside);
        }
        assert_eq!(
            vectors(&memory, &[(0, 1); MAX_VECTORS + 1]).unwrap_err(),
            Outside
        );
    }

    #[test]
    fn offsets_of_other_machines_are_refused() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let into = vectors(&memory, &[(0, 1)]).unwrap();
        assert_eq!(
            into.read_at(file.as_fd(), u64::MAX).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
