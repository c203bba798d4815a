use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap};

use crate::virtio::GuestMemory;

/// Guest memory from address zero, with a bump allocator. Clones share both.
#[derive(Clone, Debug)]
pub struct TestGuest {
    memory: GuestMemory,
    next: Arc<AtomicU64>,
}

impl TestGuest {
    /// `bytes` of zeroed memory.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        Self {
            memory: Arc::new(memory),
            // Address zero stays unused: devices may take it for "none".
            next: Arc::new(AtomicU64::new(0x1000)),
        }
    }

    /// `bytes` of zeroed memory that can be shared with another process, and the file it is.
    ///
    /// # Panics
    /// When there is no memory for it.
    #[must_use]
    pub fn shared(bytes: usize) -> (Self, File) {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("test-guest", flags).unwrap());
        file.set_len(bytes as u64).unwrap();
        let range = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), bytes, Some(range))])
                .unwrap();
        let guest = Self {
            memory: Arc::new(memory),
            next: Arc::new(AtomicU64::new(0x1000)),
        };
        (guest, file)
    }

    /// A guest with a copy of this one's memory, as a snapshot makes it.
    ///
    /// # Panics
    /// When there is no memory for it.
    #[must_use]
    pub fn copy(&self) -> Self {
        let bytes = usize::try_from(self.memory.last_addr().0).unwrap() + 1;
        let copy = Self::new(bytes);
        // What was never allocated is zero in both.
        let next = self.next.load(Ordering::Relaxed);
        copy.write(0, &self.read(0, usize::try_from(next).unwrap()));
        copy.next.store(next, Ordering::Relaxed);
        copy
    }

    /// The memory as devices see it.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        Arc::clone(&self.memory)
    }

    /// Address of `len` fresh bytes, 16-byte aligned. Never freed.
    #[must_use]
    pub fn alloc(&self, len: u64) -> u64 {
        self.next
            .fetch_add(len.next_multiple_of(16), Ordering::Relaxed)
    }

    /// Copies `bytes` to a fresh address.
    #[must_use]
    pub fn place(&self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len() as u64);
        self.write(at, bytes);
        at
    }

    /// Writes guest memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Reads guest memory.
    #[must_use]
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    pub(super) fn write_u16(&self, at: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(at), Ordering::SeqCst)
            .unwrap();
    }

    pub(super) fn read_u16(&self, at: u64) -> u16 {
        u16::from_le(
            self.memory
                .load(GuestAddress(at), Ordering::SeqCst)
                .unwrap(),
        )
    }

    pub(super) fn read_u32(&self, at: u64) -> u32 {
        u32::from_le(
            self.memory
                .load(GuestAddress(at), Ordering::SeqCst)
                .unwrap(),
        )
    }
}
