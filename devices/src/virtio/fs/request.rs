//! From a descriptor chain to a request that can be trusted to stay what it is.
//!
//! The FUSE server reads descriptors, header and body from memory that the guest can
//! change at any moment. So each worker has a private page range that is added to its
//! view of guest memory: the request is copied there once, checked there, and handed to
//! the server as a chain whose descriptors lie there too. What was checked is what is
//! served. Only bulk data, of which nothing depends, stays in guest memory: the payload
//! of WRITE and the reply.
//!
//! What WRITE sends and READ fetches may also lie in the window onto files, where a guest
//! has mapped one: it is moved by system calls, which report an address that is gone.

use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use crate::virtio::SharedMemory;

/// Bytes of a request header, `struct fuse_in_header`.
pub const IN_HEADER_LEN: usize = 40;
/// Bytes of a reply header, `struct fuse_out_header`.
pub const OUT_HEADER_LEN: usize = 16;
/// `struct fuse_in_header` and `struct fuse_write_in`.
const WRITE_HEADER_LEN: usize = IN_HEADER_LEN + 40;

/// Largest payload, as negotiated in INIT (256 pages).
const MAX_PAYLOAD: usize = 1 << 20;
/// Largest request or reply.
const MAX_MESSAGE: usize = MAX_PAYLOAD + 4096;
/// Largest request that is no WRITE: an attribute value of 64 KiB and its name.
const MAX_COPIED: usize = 128 * 1024;
/// Slices of one chain: 256 unaligned pages each way, and headers.
const MAX_SLICES: usize = 1023;

/// Layout of the private range.
const RING_SIZE: u16 = 1024;
const DESC_OFFSET: u64 = 0;
const AVAIL_OFFSET: u64 = 0x4000;
const USED_OFFSET: u64 = 0x5000;
const COPY_OFFSET: u64 = 0x8000;
const PRIVATE_LEN: usize = 0x8000 + MAX_COPIED;

/// Descriptor flags, virtio 1.2, 2.7.5.
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A buffer is not in guest memory.
    #[error("a buffer lies outside guest memory")]
    Address,
    /// Readable after writable, or nothing readable.
    #[error("the buffers are not in order")]
    Order,
    /// More than any request can have.
    #[error("the request is too large")]
    TooLarge,
    /// Less than a header, or not what the header says.
    #[error("the request's length does not fit its header")]
    Length,
    /// A name that goes on past the end of the request. The server would refuse it too,
    /// but log all of it first.
    #[error("a name has no end")]
    Name,
}

impl RequestError {
    /// What the guest is told.
    pub fn errno(self) -> i32 {
        match self {
            Self::Address => libc::EFAULT,
            Self::Order | Self::Length | Self::Name => libc::EINVAL,
            Self::TooLarge => libc::E2BIG,
        }
    }
}

/// The fields of a request that are needed to route and answer it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Length of the request, this header included.
    pub len: u32,
    /// What is asked.
    pub opcode: u32,
    /// Echoed in the reply.
    pub unique: u64,
    /// The file it is about.
    pub node: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (opcode, rest) = rest.split_first_chunk()?;
        let (unique, rest) = rest.split_first_chunk()?;
        let (node, _) = rest.split_first_chunk()?;
        Some(Self {
            len: u32::from_le_bytes(*len),
            opcode: u32::from_le_bytes(*opcode),
            unique: u64::from_le_bytes(*unique),
            node: u64::from_le_bytes(*node),
        })
    }

    /// Whether the request ends with a name or two.
    fn ends_with_name(&self) -> bool {
        [
            Opcode::Lookup as u32,
            Opcode::Symlink as u32,
            Opcode::Mknod as u32,
            Opcode::Mkdir as u32,
            Opcode::Unlink as u32,
            Opcode::Rmdir as u32,
            Opcode::Rename as u32,
            Opcode::Rename2 as u32,
            Opcode::Link as u32,
            Opcode::Create as u32,
            Opcode::Getxattr as u32,
            Opcode::Removexattr as u32,
        ]
        .contains(&self.opcode)
    }

    /// Whether the guest waits for a reply.
    pub fn wants_reply(&self) -> bool {
        ![
            Opcode::Forget as u32,
            Opcode::BatchForget as u32,
            Opcode::Interrupt as u32,
        ]
        .contains(&self.opcode)
    }
}

/// A chain, taken apart and checked against guest memory.
#[derive(Debug, Default)]
pub struct Parts {
    readable: Vec<(GuestAddress, usize)>,
    writable: Vec<(GuestAddress, usize)>,
    readable_len: usize,
    writable_len: usize,
    /// Bytes of room before the first that is not in memory but in the window.
    answerable_len: usize,
}

impl Parts {
    /// Takes `chain` apart, whose buffers are in `reach`: in `guest`, or in the window. On an
    /// error, what was found of the writable part remains.
    fn load(
        &mut self,
        guest: &GuestMemoryMmap<()>,
        reach: &GuestMemoryMmap<()>,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<(), RequestError> {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
        self.answerable_len = 0;
        for descriptor in chain {
            let len = usize::try_from(descriptor.len()).map_err(|_| RequestError::TooLarge)?;
            let (slices, total) = if descriptor.is_write_only() {
                (&mut self.writable, &mut self.writable_len)
            } else if self.writable.is_empty() {
                (&mut self.readable, &mut self.readable_len)
            } else {
                return Err(RequestError::Order);
            };
            if total.saturating_add(len) > MAX_MESSAGE {
                return Err(RequestError::TooLarge);
            }
            let mut at = descriptor.addr();
            for slice in reach.get_slices(at, len) {
                let slice = slice.map_err(|_| RequestError::Address)?;
                if slices.len() == MAX_SLICES {
                    return Err(RequestError::TooLarge);
                }
                slices.push((at, slice.len()));
                at = at.unchecked_add(slice.len() as u64);
            }
            *total = total.saturating_add(len);
            if guest.check_range(descriptor.addr(), len)
                && self.answerable_len.saturating_add(len) == self.writable_len
            {
                self.answerable_len = self.writable_len;
            }
        }
        Ok(())
    }

    /// Bytes the guest has room for.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Writes a reply that is only an error, or zero; returns its length, zero if it has no
    /// room.
    pub fn reply_status(&self, guest: &GuestMemoryMmap<()>, unique: u64, errno: i32) -> usize {
        if self.writable_len < OUT_HEADER_LEN {
            return 0;
        }
        let mut reply = [0; OUT_HEADER_LEN];
        let fields = 16_u32
            .to_le_bytes()
            .into_iter()
            .chain(errno.saturating_neg().to_le_bytes())
            .chain(unique.to_le_bytes());
        for (to, from) in reply.iter_mut().zip(fields) {
            *to = from;
        }
        if self.write(guest, 0, &reply) {
            OUT_HEADER_LEN
        } else {
            0
        }
    }

    /// Writes `bytes` at `offset` of the reply; false if that is not all in guest memory.
    pub fn write(&self, guest: &GuestMemoryMmap<()>, offset: usize, bytes: &[u8]) -> bool {
        let (mut skip, mut rest) = (offset, bytes);
        for &(at, len) in &self.writable {
            let skipped = skip.min(len);
            skip = skip.saturating_sub(skipped);
            let left = len.saturating_sub(skipped);
            let (head, tail) = rest.split_at(left.min(rest.len()));
            if !head.is_empty()
                && guest
                    .write_slice(head, at.unchecked_add(skipped as u64))
                    .is_err()
            {
                return false;
            }
            rest = tail;
        }
        rest.is_empty()
    }
}

/// A worker's private view of guest memory. See the module's documentation.
#[derive(Debug)]
pub struct Staging {
    memory: GuestMemoryMmap<()>,
    /// Where buffers may lie.
    reach: GuestMemoryMmap<()>,
    /// Kept as long as it is part of them.
    _window: Option<Arc<SharedMemory>>,
    base: GuestAddress,
    queue: Queue,
    parts: Parts,
    copy: Vec<u8>,
}

/// A request as [`Staging`] hands it to the server.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

impl Staging {
    /// Adds a private range to a view of `guest` and `window`, above all of them.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn new(
        guest: &GuestMemoryMmap<()>,
        window: Option<&Arc<SharedMemory>>,
    ) -> io::Result<Self> {
        let region = window.map(|window| window.region()).transpose()?.flatten();
        let reach = match region {
            Some(region) => guest.insert_region(Arc::new(region)),
            None => Ok(guest.clone()),
        };
        let reach = reach.map_err(io::Error::other)?;
        let base = reach
            .last_addr()
            .checked_align_up(1 << 30)
            .ok_or_else(|| io::Error::other("guest memory ends at the top of its address space"))?;
        let mapping = MmapRegion::new(PRIVATE_LEN).map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, base)
            .ok_or_else(|| io::Error::other("no room above guest memory"))?;
        let memory = reach
            .insert_region(Arc::new(region))
            .map_err(io::Error::other)?;
        let mut queue = Queue::new(RING_SIZE).map_err(io::Error::other)?;
        let at = |offset| base.unchecked_add(offset);
        queue
            .try_set_desc_table_address(at(DESC_OFFSET))
            .and_then(|()| queue.try_set_avail_ring_address(at(AVAIL_OFFSET)))
            .and_then(|()| queue.try_set_used_ring_address(at(USED_OFFSET)))
            .map_err(io::Error::other)?;
        queue.set_ready(true);
        Ok(Self {
            memory,
            reach,
            _window: window.cloned(),
            base,
            queue,
            parts: Parts::default(),
            copy: Vec::new(),
        })
    }

    /// The chain of the last [`Self::stage`].
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// What comes behind the header of the last request, but for the data of a WRITE.
    pub fn body(&self) -> &[u8] {
        self.copy.get(IN_HEADER_LEN..).unwrap_or_default()
    }

    /// Copies and checks the request in `chain`. The header is returned with an error too,
    /// if there was one.
    pub fn stage(
        &mut self,
        guest: &GuestMemoryMmap<()>,
        chain: impl Iterator<Item = Descriptor>,
    ) -> (Header, Result<(), RequestError>) {
        let mut header = Header::default();
        let result = self
            .parts
            .load(guest, &self.reach, chain)
            .and_then(|()| self.copy_request(guest, &mut header))
            .and_then(|copied| self.build_chain(copied));
        (header, result)
    }

    /// Copies what is to be trusted; returns how much of the request that is.
    fn copy_request(
        &mut self,
        guest: &GuestMemoryMmap<()>,
        header: &mut Header,
    ) -> Result<usize, RequestError> {
        let total = self.parts.readable_len;
        self.copy.clear();
        self.copy_to(guest, total.min(WRITE_HEADER_LEN))?;
        if total < IN_HEADER_LEN {
            return Err(RequestError::Length);
        }
        *header = Header::parse(&self.copy).ok_or(RequestError::Length)?;
        if usize::try_from(header.len) != Ok(total) {
            return Err(RequestError::Length);
        }
        if header.opcode != Opcode::Write as u32 {
            if total > MAX_COPIED {
                return Err(RequestError::TooLarge);
            }
            self.copy_to(guest, total)?;
        }
        // Other replies, and the headers of all, are written without a system call.
        let written = match header.opcode == Opcode::Read as u32 {
            true => OUT_HEADER_LEN.min(self.parts.writable_len),
            false => self.parts.writable_len,
        };
        if self.parts.answerable_len < written {
            return Err(RequestError::Address);
        }
        if header.ends_with_name() && self.copy.last() != Some(&0) {
            return Err(RequestError::Name);
        }
        let at = self.base.unchecked_add(COPY_OFFSET);
        self.memory
            .write_slice(&self.copy, at)
            .map_err(|_| RequestError::Address)?;
        Ok(self.copy.len())
    }

    /// Extends the copy to `len` bytes; what is there is not read again.
    fn copy_to(&mut self, guest: &GuestMemoryMmap<()>, len: usize) -> Result<(), RequestError> {
        let mut start = 0_usize;
        for &(at, slice_len) in &self.parts.readable {
            let end = start.saturating_add(slice_len).min(len);
            let have = self.copy.len();
            if end > have {
                self.copy.resize(end, 0);
                let skip = have.saturating_sub(start);
                let from = at.unchecked_add(skip as u64);
                let to = self.copy.get_mut(have..).unwrap_or_default();
                guest
                    .read_slice(to, from)
                    .map_err(|_| RequestError::Address)?;
            }
            start = start.saturating_add(slice_len);
        }
        Ok(())
    }

    /// Writes the private chain: the copy, the rest of the request, the reply's room.
    fn build_chain(&mut self, copied: usize) -> Result<(), RequestError> {
        let copy = (self.base.unchecked_add(COPY_OFFSET), copied);
        let mut skip = copied;
        let rest = self.parts.readable.iter().filter_map(|&(at, len)| {
            let skipped = skip.min(len);
            skip = skip.saturating_sub(skipped);
            let left = len.saturating_sub(skipped);
            (left > 0).then(|| (at.unchecked_add(skipped as u64), left))
        });
        let readable = std::iter::once(copy).chain(rest).map(|slice| (slice, 0));
        let writable = self.parts.writable.iter().map(|&slice| (slice, F_WRITE));
        let mut slices = readable.chain(writable).peekable();
        let mut index = 0_u16;
        while let Some(((at, len), flags)) = slices.next() {
            if index >= RING_SIZE {
                return Err(RequestError::TooLarge);
            }
            let len = u32::try_from(len).map_err(|_| RequestError::TooLarge)?;
            let next = index.saturating_add(1);
            let flags = flags | if slices.peek().is_some() { F_NEXT } else { 0 };
            let descriptor = RawDescriptor::from(Descriptor::new(at.0, len, flags, next));
            let slot = DESC_OFFSET.saturating_add(u64::from(index).saturating_mul(16));
            self.memory
                .write_obj(descriptor, self.base.unchecked_add(slot))
                .map_err(|_| RequestError::Address)?;
            index = next;
        }
        Ok(())
    }

    /// The staged request. `stage` must have succeeded.
    pub fn chain(&mut self) -> Option<Chain<'_>> {
        // Descriptor 0 is always the head, and always the one available entry.
        let idx = self.queue.next_avail().wrapping_add(1);
        let at = self.base.unchecked_add(AVAIL_OFFSET.saturating_add(2));
        self.memory.write_obj(idx.to_le(), at).ok()?;
        self.queue.iter(&self.memory).ok()?.next()
    }
}
