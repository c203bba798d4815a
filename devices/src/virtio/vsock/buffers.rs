//! A descriptor chain as checked slices of guest memory.
//!
//! virtio 1.2, 2.7.4.1: the device must not rely on how the driver cuts a packet into
//! descriptors. Linux sends header and payload in one descriptor or in two, and zero-copy
//! senders in many, which is why the packet type of the `virtio-vsock` crate (at most one
//! payload descriptor) does not fit.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use vm_memory::{GuestMemory as _, VolatileSlice};

use super::packet::{HEADER_LEN, MAX_PAYLOAD};

/// Descriptors of one packet that are looked at: Linux needs at most header + 17 fragments.
const MAX_SLICES: usize = 64;
/// Bytes of one chain that are looked at; what a driver offers beyond that is left alone.
const MAX_BYTES: usize = HEADER_LEN + MAX_PAYLOAD;

/// Why a chain is no packet.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor has the wrong direction.
    #[error("a descriptor has the wrong direction")]
    Direction,
    /// A descriptor points outside guest memory.
    #[error("a descriptor points outside guest memory")]
    Address,
    /// Too many descriptors.
    #[error("more than {MAX_SLICES} descriptors in a packet")]
    TooLong,
    /// Too little for a header.
    #[error("{0} bytes are no packet")]
    TooShort(usize),
}

/// Who writes to the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them: the guest's transmit queue.
    FromGuest,
    /// The device writes them: the guest's receive queue.
    ToGuest,
}

/// The buffers of one chain, in order; reusable between chains.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Takes the buffers of `chain`, at least a header's worth.
    ///
    /// # Errors
    /// See [`ChainError`]; the chain goes back to the driver unused then.
    pub fn load(
        &mut self,
        memory: &'m vm_memory::GuestMemoryMmap<()>,
        chain: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
        direction: Direction,
    ) -> Result<(), ChainError> {
        self.slices.clear();
        self.len = 0;
        let writable = direction == Direction::ToGuest;
        for descriptor in chain {
            if descriptor.is_write_only() != writable {
                return Err(ChainError::Direction);
            }
            let room = MAX_BYTES.saturating_sub(self.len);
            let len = usize::try_from(descriptor.len()).map_or(room, |len| len.min(room));
            if len == 0 {
                continue;
            }
            for slice in memory.get_slices(descriptor.addr(), len) {
                if self.slices.len() == MAX_SLICES {
                    return Err(ChainError::TooLong);
                }
                self.slices.push(slice.map_err(|_| ChainError::Address)?);
            }
            self.len = self.len.saturating_add(len);
        }
        if self.len < HEADER_LEN {
            return Err(ChainError::TooShort(self.len));
        }
        Ok(())
    }

    /// Bytes after the header.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.len.saturating_sub(HEADER_LEN)
    }

    /// The slices that cover `len` bytes from `offset`, cut to fit.
    fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut skip = offset;
        let mut left = len;
        self.slices.iter().filter_map(move |slice| {
            let skipped = skip.min(slice.len());
            skip = skip.saturating_sub(skipped);
            let take = slice.len().saturating_sub(skipped).min(left);
            left = left.saturating_sub(take);
            if take == 0 {
                return None;
            }
            slice.subslice(skipped, take).ok()
        })
    }

    /// The raw header bytes.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        self.copy_out(0, &mut bytes);
        bytes
    }

    /// Writes the header bytes.
    pub fn set_header(&self, bytes: &[u8; HEADER_LEN]) {
        let mut rest = bytes.as_slice();
        for slice in self.range(0, HEADER_LEN) {
            let Some((head, tail)) = rest.split_at_checked(slice.len()) else {
                return;
            };
            slice.copy_from(head);
            rest = tail;
        }
    }

    /// Copies payload bytes from `offset` into `out`.
    pub fn copy_payload(&self, offset: usize, out: &mut [u8]) {
        self.copy_out(HEADER_LEN.saturating_add(offset), out);
    }

    fn copy_out(&self, offset: usize, out: &mut [u8]) {
        let mut rest = out;
        for slice in self.range(offset, rest.len()) {
            let Some((head, tail)) = rest.split_at_mut_checked(slice.len()) else {
                return;
            };
            slice.copy_to(head);
            rest = tail;
        }
    }

    /// Receives at most `limit` payload bytes from a stream socket straight into guest
    /// memory, without blocking. Zero means end of stream.
    ///
    /// # Errors
    /// As recvmsg(2); `WouldBlock` when there is nothing now.
    pub fn recv_payload(&self, socket: &impl AsFd, limit: usize) -> io::Result<usize> {
        self.transfer(0, limit, |message| {
            // SAFETY: the message's vectors lie in guest memory (see `transfer`), which other
            // threads may change but nobody unmaps; the fd is open while borrowed.
            unsafe {
                libc::recvmsg(
                    socket.as_fd().as_raw_fd(),
                    message,
                    libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
                )
            }
        })
    }

    /// Sends payload bytes `offset..offset + limit` from guest memory to a stream socket,
    /// without blocking and without SIGPIPE.
    ///
    /// # Errors
    /// As sendmsg(2); `WouldBlock` when the socket is full.
    pub fn send_payload(
        &self,
        socket: &impl AsFd,
        offset: usize,
        limit: usize,
    ) -> io::Result<usize> {
        self.transfer(offset, limit, |message| {
            // SAFETY: as in `recv_payload`; the kernel only reads the vectors.
            unsafe {
                libc::sendmsg(
                    socket.as_fd().as_raw_fd(),
                    message,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            }
        })
    }

    /// Runs one vectored system call on payload bytes `offset..offset + limit`.
    fn transfer(
        &self,
        offset: usize,
        limit: usize,
        call: impl Fn(*mut libc::msghdr) -> isize,
    ) -> io::Result<usize> {
        let mut vectors = [libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        }; MAX_SLICES];
        let mut count = 0;
        let start = HEADER_LEN.saturating_add(offset);
        for (vector, slice) in vectors.iter_mut().zip(self.range(start, limit)) {
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            count += 1;
        }
        // SAFETY: all zero is a valid msghdr: no name, no vectors, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // Each vector is a `VolatileSlice` of a mapping that lives for 'm, hence longer
        // than the call; without the `xen` feature its pointer guard maps nothing.
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = count;
        loop {
            let done = call(&raw mut message);
            match usize::try_from(done) {
                Ok(done) => return Ok(done),
                Err(_) => {
                    let err = io::Error::last_os_error();
                    if err.kind() != io::ErrorKind::Interrupted {
                        return Err(err);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const WRITE: u16 = 2;

    /// Two regions that touch, so that buffers can span them.
    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x10000),
            (GuestAddress(0x10000), 0x20000),
        ])
        .unwrap()
    }

    fn chain(parts: &[(u64, u32)], flags: u16) -> impl Iterator<Item = Descriptor> {
        parts
            .iter()
            .map(|&(addr, len)| Descriptor::new(addr, len, flags, 0))
            .collect::<Vec<_>>()
            .into_iter()
    }

    #[test]
    fn header_and_payload_may_be_cut_anywhere() {
        let memory = memory();
        let packet: Vec<u8> = (0..=255).collect();
        memory.write_slice(&packet, GuestAddress(0xffd0)).unwrap();
        let mut buffers = Buffers::default();
        let (mut here, mut there) = UnixStream::pair().unwrap();
        for cuts in [
            vec![256],
            vec![44, 212],
            vec![43, 1, 0, 212],
            vec![1, 47, 208],
        ] {
            let mut addr = 0xffd0;
            let parts: Vec<_> = cuts
                .iter()
                .map(|&len| {
                    let part = (addr, len);
                    addr += u64::from(len);
                    part
                })
                .collect();
            buffers
                .load(&memory, chain(&parts, 0), Direction::FromGuest)
                .unwrap();
            assert_eq!(buffers.payload_len(), 212);
            assert_eq!(buffers.header().as_slice(), &packet[..44]);
            let mut tail = [0; 100];
            buffers.copy_payload(112, &mut tail);
            assert_eq!(tail.as_slice(), &packet[156..]);
            assert_eq!(buffers.send_payload(&here, 2, 200).unwrap(), 200);
            let mut got = [0; 200];
            there.read_exact(&mut got).unwrap();
            assert_eq!(got.as_slice(), &packet[46..246]);
        }
        // The other direction, into descriptors of the second region.
        buffers
            .load(
                &memory,
                chain(&[(0x12000, 30), (0x13000, 100)], WRITE),
                Direction::ToGuest,
            )
            .unwrap();
        there.write_all(b"straight into guest memory").unwrap();
        assert_eq!(buffers.recv_payload(&here, 8).unwrap(), 8);
        buffers.set_header(&[7; HEADER_LEN]);
        let mut seen = [0; 22];
        memory.read_slice(&mut seen, GuestAddress(0x13000)).unwrap();
        assert_eq!(&seen[..14], [7; 14]);
        assert_eq!(&seen[14..], b"straight");
        let mut rest = Vec::new();
        drop(there);
        here.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b" into guest memory");
    }

    #[test]
    fn bad_chains_are_refused() {
        let memory = memory();
        let mut buffers = Buffers::default();
        let mut load = |parts: &[(u64, u32)], flags| {
            buffers.load(&memory, chain(parts, flags), Direction::FromGuest)
        };
        assert_eq!(load(&[(0, 43)], 0), Err(ChainError::TooShort(43)));
        assert_eq!(load(&[], 0), Err(ChainError::TooShort(0)));
        assert_eq!(load(&[(0, 100)], WRITE), Err(ChainError::Direction));
        assert_eq!(load(&[(0x2ff00, 0x1000)], 0), Err(ChainError::Address));
        assert_eq!(load(&[(u64::MAX - 4, 64)], 0), Err(ChainError::Address));
        assert_eq!(load(&[(0, 1); 65], 0), Err(ChainError::TooLong));
        // A huge length is cut to one packet before memory is touched.
        assert_eq!(load(&[(0, u32::MAX)], 0), Ok(()));
        assert_eq!(buffers.payload_len(), MAX_PAYLOAD);
    }
}
