use std::collections::BTreeMap;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::TestGuest;
use crate::virtio::ActiveQueue;

/// Descriptor flag: the chain goes on at `next` (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
const WRITE: u16 = 2;

/// One element of a chain.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// Bytes the device reads; placed in fresh guest memory.
    Readable(Vec<u8>),
    /// Fresh guest memory of this length for the device to write.
    Writable(u32),
    /// A descriptor as given except for the NEXT flag and `next`: for bad addresses and
    /// lengths.
    Raw(RawDescriptor),
}

/// A descriptor table entry (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// Following descriptor when NEXT is set.
    pub next: u16,
}

impl RawDescriptor {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain the device gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head descriptor of the chain.
    pub head: u16,
    /// Bytes the device says it wrote; may be a lie.
    pub len: u32,
    /// What is in the writable buffers, all of them joined, cut to `len`.
    pub data: Vec<u8>,
}

/// The driver's half of a split virtqueue.
#[derive(Debug)]
pub struct VirtQueueDriver {
    guest: TestGuest,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
    /// By head: the chain's descriptor indices and writable buffers.
    chains: BTreeMap<u16, Chain>,
    notify: EventFd,
}

#[derive(Debug)]
struct Chain {
    descriptors: Vec<u16>,
    writable: Vec<(u64, u32)>,
}

impl VirtQueueDriver {
    /// Lays out a queue of `size` entries (a power of two) in fresh guest memory.
    #[must_use]
    pub fn new(guest: &TestGuest, size: u16) -> Self {
        let entries = u64::from(size);
        let desc = guest.alloc(16 * entries);
        let avail = guest.alloc(6 + 2 * entries);
        let used = guest.alloc(6 + 8 * entries);
        // The ring must not be the last thing in memory to count as valid.
        let _ = guest.alloc(16);
        Self {
            guest: guest.clone(),
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            notify: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// Goes on in `guest`, a copy of the memory so far.
    pub fn move_to(&mut self, guest: &TestGuest) {
        self.guest = guest.clone();
    }

    /// Addresses of the descriptor table, the driver area and the device area.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.desc, self.avail, self.used)
    }

    /// Entries of each ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// What [`Self::kick`] writes.
    #[must_use]
    pub fn notify(&self) -> &EventFd {
        &self.notify
    }

    /// The device's half, ready to use.
    #[must_use]
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.desc))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .unwrap();
        queue.set_ready(true);
        queue
    }

    /// The queue as a device gets it at activation.
    #[must_use]
    pub fn activate(&self, index: u16) -> ActiveQueue {
        ActiveQueue {
            index,
            queue: self.queue(),
            notify: self.notify.try_clone().unwrap(),
        }
    }

    /// Makes a chain available and returns its head. Call [`Self::kick`] afterwards.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty(), "a chain has at least one descriptor");
        let descriptors: Vec<u16> = buffers
            .iter()
            .map(|_| self.free.pop().expect("descriptor table is full"))
            .collect();
        let mut writable = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let mut raw = match buffer {
                Buffer::Readable(bytes) => RawDescriptor {
                    addr: self.guest.place(bytes),
                    len: u32::try_from(bytes.len()).unwrap(),
                    ..RawDescriptor::default()
                },
                Buffer::Writable(len) => {
                    let addr = self.guest.alloc(u64::from(*len));
                    writable.push((addr, *len));
                    RawDescriptor {
                        addr,
                        len: *len,
                        flags: WRITE,
                        next: 0,
                    }
                }
                Buffer::Raw(raw) => *raw,
            };
            if let Some(next) = descriptors.get(position + 1) {
                raw.flags |= NEXT;
                raw.next = *next;
            }
            self.write_descriptor(descriptors[position], raw);
        }
        let head = descriptors[0];
        self.chains.insert(
            head,
            Chain {
                descriptors,
                writable,
            },
        );
        self.publish(head);
        head
    }

    /// A chain whose last descriptor points back to its first.
    pub fn add_loop(&mut self, length: u16) -> u16 {
        let indices: Vec<u16> = (0..length)
            .map(|_| self.free.pop().expect("descriptor table is full"))
            .collect();
        let addr = self.guest.alloc(16);
        for (position, index) in indices.iter().enumerate() {
            let next = indices[(position + 1) % indices.len()];
            self.write_descriptor(
                *index,
                RawDescriptor {
                    addr,
                    len: 16,
                    flags: NEXT,
                    next,
                },
            );
        }
        self.chains.insert(
            indices[0],
            Chain {
                descriptors: indices.clone(),
                writable: Vec::new(),
            },
        );
        self.publish(indices[0]);
        indices[0]
    }

    /// Writes one descriptor as given; indices past the table are ignored.
    pub fn write_descriptor(&mut self, index: u16, raw: RawDescriptor) {
        if index < self.size {
            self.guest
                .write(self.desc + 16 * u64::from(index), &raw.to_bytes());
        }
    }

    /// Puts `head`, whatever it is, in the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.guest.write_u16(self.avail + 4 + 2 * slot, head);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index, truthfully or not.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.guest.write_u16(self.avail + 2, idx);
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.notify.write(1).unwrap();
    }

    /// How many chains the device has used, modulo 2^16.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.guest.read_u16(self.used + 2)
    }

    /// Chains waiting in the used ring.
    #[must_use]
    pub fn used_pending(&self) -> u16 {
        self.used_index().wrapping_sub(self.used_idx)
    }

    /// Takes the next used chain, if any, and frees its descriptors.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_pending() == 0 {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        self.used_idx = self.used_idx.wrapping_add(1);
        // used_event: interrupt at the next one (virtio 1.2, 2.7.10).
        self.guest
            .write_u16(self.avail + 4 + 2 * u64::from(self.size), self.used_idx);
        // Anything at all when a hostile driver has let the device write to the ring.
        let head = self.guest.read_u16(slot);
        let len = self.guest.read_u32(slot + 4);
        let mut data = Vec::new();
        if let Some(chain) = self.chains.remove(&head) {
            self.free.extend(chain.descriptors);
            for (addr, buffer_len) in chain.writable {
                let left = len as usize - data.len().min(len as usize);
                data.extend(self.guest.read(addr, left.min(buffer_len as usize)));
            }
        }
        Some(Used { head, len, data })
    }
}
