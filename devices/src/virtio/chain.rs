//! A descriptor chain as checked, bounded parts of guest memory (virtio 1.2, 2.7.4).
//!
//! The driver may cut a request into descriptors as it likes (2.7.4.1), so devices see the
//! readable and the writable bytes of a chain, never single descriptors.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap};

/// Why a chain is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// It has no descriptor, or ends before a descriptor without NEXT.
    #[error("the descriptor chain is broken")]
    Broken,
    /// A readable descriptor follows a writable one (2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// More descriptors than the device advertises.
    #[error("the descriptor chain is too long")]
    TooLong,
}

/// A range of bytes is not (all) there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a buffer is too short or outside guest memory")]
pub(crate) struct Outside;

/// A run of guest memory as the driver gave it, not yet checked against the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) addr: GuestAddress,
    pub(crate) len: usize,
}

/// Bytes scattered over guest memory, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    parts: Vec<Part>,
    bytes: usize,
}

impl Parts {
    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// The runs, none of them empty.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Part> + '_ {
        self.parts.iter().copied()
    }

    /// Whether all of it is guest memory.
    pub(crate) fn is_in(&self, memory: &GuestMemoryMmap<()>) -> bool {
        self.iter()
            .all(|part| memory.check_range(part.addr, part.len))
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.bytes = 0;
    }

    fn push(&mut self, addr: GuestAddress, len: usize) {
        if len > 0 {
            self.parts.push(Part { addr, len });
            self.bytes = self.bytes.saturating_add(len);
        }
    }

    /// The runs that cover `len` bytes from `offset`.
    fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = Result<Part, Outside>> {
        let (mut skip, mut left) = (offset, len);
        self.parts.iter().filter_map(move |part| {
            let skipped = skip.min(part.len);
            skip = skip.saturating_sub(skipped);
            let take = part.len.saturating_sub(skipped).min(left);
            left = left.saturating_sub(take);
            let skipped = u64::try_from(skipped).ok()?;
            (take > 0).then(|| {
                let addr = part.addr.checked_add(skipped).ok_or(Outside)?;
                Ok(Part { addr, len: take })
            })
        })
    }

    /// Copies the bytes from `offset` on into all of `out`.
    pub(crate) fn read(
        &self,
        memory: &GuestMemoryMmap<()>,
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), Outside> {
        let mut rest = out;
        for part in self.range(offset, rest.len()) {
            let part = part?;
            let (now, later) = rest.split_at_mut_checked(part.len).ok_or(Outside)?;
            memory.read_slice(now, part.addr).map_err(|_| Outside)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Outside)
        }
    }

    /// Copies all of `data` to the bytes from `offset` on.
    pub(crate) fn write(
        &self,
        memory: &GuestMemoryMmap<()>,
        offset: usize,
        data: &[u8],
    ) -> Result<(), Outside> {
        let mut rest = data;
        for part in self.range(offset, rest.len()) {
            let part = part?;
            let (now, later) = rest.split_at_checked(part.len).ok_or(Outside)?;
            memory.write_slice(now, part.addr).map_err(|_| Outside)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Outside)
        }
    }

    /// Drops the first `bytes` bytes.
    pub(crate) fn skip(&mut self, bytes: usize) -> Result<(), Outside> {
        let left = self.bytes.checked_sub(bytes).ok_or(Outside)?;
        let parts = self
            .range(bytes, left)
            .collect::<Result<Vec<_>, Outside>>()?;
        self.parts = parts;
        self.bytes = left;
        Ok(())
    }

    /// Takes the last byte off and returns its address.
    pub(crate) fn pop_byte(&mut self) -> Result<GuestAddress, Outside> {
        let last = self.parts.last_mut().ok_or(Outside)?;
        let left = last.len.checked_sub(1).ok_or(Outside)?;
        let offset = u64::try_from(left).map_err(|_| Outside)?;
        let addr = last.addr.checked_add(offset).ok_or(Outside)?;
        last.len = left;
        if left == 0 {
            self.parts.pop();
        }
        self.bytes = self.bytes.saturating_sub(1);
        Ok(addr)
    }
}

/// The two halves of one chain; reusable between chains.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain {
    /// What the driver sends.
    pub(crate) readable: Parts,
    /// Where the device answers.
    pub(crate) writable: Parts,
}

impl Chain {
    /// Takes the buffers of `descriptors`, at most `max` of them.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub(crate) fn load(
        &mut self,
        descriptors: impl Iterator<Item = Descriptor>,
        max: usize,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut answering = false;
        // Whether the driver promised another descriptor: the iterator ends silently at
        // one that it cannot follow.
        let mut goes_on = true;
        for (count, descriptor) in descriptors.enumerate() {
            if count == max {
                return Err(ChainError::TooLong);
            }
            goes_on = descriptor.has_next();
            let len = usize::try_from(descriptor.len()).map_err(|_| ChainError::TooLong)?;
            if descriptor.is_write_only() {
                answering = true;
                self.writable.push(descriptor.addr(), len);
            } else if answering {
                return Err(ChainError::Order);
            } else {
                self.readable.push(descriptor.addr(), len);
            }
        }
        if goes_on {
            Err(ChainError::Broken)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    fn load(descriptors: &[(u64, u32, u16)]) -> Result<Chain, ChainError> {
        let mut chain = Chain::default();
        let last = descriptors.len().saturating_sub(1);
        let descriptors = descriptors
            .iter()
            .enumerate()
            .map(|(index, &(addr, len, flags))| {
                let next = if index == last { 0 } else { NEXT };
                Descriptor::new(addr, len, flags | next, 0)
            });
        chain.load(descriptors, 8).map(|()| chain)
    }

    #[test]
    fn halves_are_told_apart() {
        let chain = load(&[(0, 16, 0), (64, 0, 0), (32, 8, 0), (128, 4, WRITE)]).unwrap();
        assert_eq!(chain.readable.len(), 24);
        assert_eq!(chain.readable.iter().count(), 2);
        assert_eq!(chain.writable.len(), 4);
    }

    #[test]
    fn rules_2_7_4() {
        assert_eq!(load(&[]).unwrap_err(), ChainError::Broken);
        assert_eq!(load(&[(0, 1, NEXT)]).unwrap_err(), ChainError::Broken);
        assert_eq!(
            load(&[(0, 1, WRITE), (0, 1, 0)]).unwrap_err(),
            ChainError::Order
        );
        // An empty writable descriptor is a writable one all the same.
        assert_eq!(
            load(&[(0, 0, WRITE), (0, 1, 0)]).unwrap_err(),
            ChainError::Order
        );
        assert_eq!(load(&[(0, 1, 0); 9]).unwrap_err(), ChainError::TooLong);
        load(&[(0, 1, 0); 8]).unwrap();
    }

    #[test]
    fn the_last_byte_comes_off() {
        let mut parts = load(&[(0, 3, WRITE), (100, 1, WRITE)]).unwrap().writable;
        assert_eq!(parts.pop_byte(), Ok(GuestAddress(100)));
        assert_eq!(parts.pop_byte(), Ok(GuestAddress(2)));
        assert_eq!(parts.len(), 2);
        assert_eq!(parts.pop_byte(), Ok(GuestAddress(1)));
        assert_eq!(parts.pop_byte(), Ok(GuestAddress(0)));
        assert_eq!(parts.pop_byte(), Err(Outside));
    }

    #[test]
    fn bytes_outside_memory_are_refused() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut out = [0; 8];
        for addr in [0xffc, 0x1000, u64::MAX - 3] {
            let parts = load(&[(addr, 8, 0)]).unwrap().readable;
            assert_eq!(parts.read(&memory, 0, &mut out), Err(Outside), "{addr:#x}");
            assert_eq!(parts.write(&memory, 0, &out), Err(Outside), "{addr:#x}");
        }
        let parts = load(&[(0, 8, 0)]).unwrap().readable;
        assert_eq!(parts.read(&memory, 1, &mut out), Err(Outside));
        parts.read(&memory, 0, &mut out).unwrap();
    }

    proptest! {
        /// However the bytes are cut, the same ones are read back.
        #[test]
        fn cuts_do_not_matter(
            lens in proptest::collection::vec(0_u32..9, 1..8),
            skip in 0_usize..20,
            offset in 0_usize..20,
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mut flat = Vec::new();
            let descriptors: Vec<_> = lens
                .iter()
                .zip(0_u8..)
                .map(|(len, index)| {
                    let addr = 0x800 - u64::from(index) * 0x40;
                    for byte in 0..*len {
                        let value = index.wrapping_mul(16) + u8::try_from(byte).unwrap();
                        memory.write_obj(value, GuestAddress(addr + u64::from(byte))).unwrap();
                        flat.push(value);
                    }
                    (addr, *len, 0)
                })
                .collect();
            let mut parts = load(&descriptors).unwrap().readable;
            prop_assert_eq!(parts.len(), flat.len());
            prop_assert_eq!(parts.skip(skip).is_ok(), skip <= flat.len());
            if skip <= flat.len() {
                flat.drain(..skip);
            }
            let want = flat.get(offset..).unwrap_or_default();
            let mut got = vec![0; want.len()];
            parts.read(&memory, offset, &mut got).unwrap();
            prop_assert_eq!(&got, want);
            let mut too_much = vec![0; want.len() + 1];
            prop_assert_eq!(parts.read(&memory, offset, &mut too_much), Err(Outside));
        }
    }
}
