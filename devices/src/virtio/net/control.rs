//! The control queue (virtio 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::MAX_DESCRIPTORS;
use super::config::GUEST_OFFLOADS;
use super::link::Link;
use super::tx::Stopped;
use crate::virtio::chain::{Chain, Parts};
use crate::virtio::notify::{self, QueueError};
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

/// Commands taken per turn of the event loop.
const MAX_COMMANDS_PER_EVENT: usize = 16;
/// `class` and `command`.
const HEADER_BYTES: usize = 2;
const MAC_BYTES: usize = 6;

/// The device does not take the command: the driver gets `VIRTIO_NET_ERR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refused;

/// The control queue.
#[derive(Debug)]
pub(super) struct ControlQueue {
    pub(super) active: ActiveQueue,
    memory: GuestMemory,
    chain: Chain,
    /// As negotiated.
    features: u64,
    /// Pairs of queues that the driver has set up.
    pairs: u16,
}

impl ControlQueue {
    pub(super) fn new(
        memory: &GuestMemory,
        active: ActiveQueue,
        features: u64,
        pairs: u16,
    ) -> Self {
        Self {
            active,
            memory: memory.clone(),
            chain: Chain::default(),
            features,
            pairs,
        }
    }

    /// Runs commands.
    pub(super) fn pump(
        &mut self,
        link: &Link,
        interrupt: &dyn Interrupt,
    ) -> Result<Stopped, QueueError> {
        let first = self.active.queue.next_used();
        let stopped = self.serve(link)?;
        notify::used_since(&self.memory, &self.active, first, interrupt)?;
        Ok(stopped)
    }

    fn serve(&mut self, link: &Link) -> Result<Stopped, QueueError> {
        let memory = self.memory.clone();
        for _ in 0..MAX_COMMANDS_PER_EVENT {
            let Some(descriptors) = self.active.queue.iter(&*memory)?.next() else {
                if self.active.queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(Stopped::Idle);
            };
            let head = descriptors.head_index();
            let loaded = self.chain.load(descriptors, MAX_DESCRIPTORS).is_ok();
            let mut written = 0;
            if let (true, Ok(ack)) = (loaded, self.chain.writable.pop_byte()) {
                let answer = match self.command(&memory, link) {
                    Ok(()) => VIRTIO_NET_OK,
                    Err(Refused) => VIRTIO_NET_ERR,
                };
                let [answer, ..] = answer.to_le_bytes();
                // What is in front of the ack, if anything, was not written.
                let only_ack = self.chain.writable.len() == 0;
                if memory.write_obj(answer, ack).is_ok() && only_ack {
                    written = 1;
                }
            }
            self.active.queue.add_used(&*memory, head, written)?;
        }
        Ok(Stopped::Budget)
    }

    fn command(&self, memory: &GuestMemoryMmap<()>, link: &Link) -> Result<(), Refused> {
        let data = &self.chain.readable;
        let [class, command] = read::<HEADER_BYTES>(data, memory, 0)?;
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, mode @ 0..=VIRTIO_NET_CTRL_RX_NOBCAST) => {
                let [on] = exactly(data, memory)?;
                let bit = 1_u8.checked_shl(mode).ok_or(Refused)?;
                change(link, |settings| {
                    if on == 0 {
                        settings.rx_mode &= !bit;
                    } else {
                        settings.rx_mode |= bit;
                    }
                })
            }
            // The tap gets what its host sends it: nothing to filter, the table only has
            // to be one.
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => check_tables(data, memory),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                let mac: [u8; MAC_BYTES] = exactly(data, memory)?;
                change(link, |settings| settings.mac = mac)
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let pairs = u16::from_le_bytes(exactly(data, memory)?);
                if !(1..=self.pairs).contains(&pairs) {
                    return Err(Refused);
                }
                change(link, |settings| settings.pairs = pairs)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let offloads = u64::from_le_bytes(exactly(data, memory)?);
                // 5.1.6.5.6.1: only what was negotiated.
                if offloads & !(self.features & GUEST_OFFLOADS) != 0 {
                    return Err(Refused);
                }
                change(link, |settings| settings.offloads = offloads)
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                change(link, |settings| settings.announce = false)
            }
            _ => Err(Refused),
        }
    }
}

fn change(link: &Link, change: impl FnOnce(&mut super::link::Settings)) -> Result<(), Refused> {
    link.set(change).map_err(|err| {
        tracing::warn!(%err, "control command refused");
        Refused
    })
}

fn read<const N: usize>(
    data: &Parts,
    memory: &GuestMemoryMmap<()>,
    offset: usize,
) -> Result<[u8; N], Refused> {
    let mut bytes = [0; N];
    data.read(memory, offset, &mut bytes).map_err(|_| Refused)?;
    Ok(bytes)
}

/// The command's data, which must have this length.
fn exactly<const N: usize>(data: &Parts, memory: &GuestMemoryMmap<()>) -> Result<[u8; N], Refused> {
    if data.len() != HEADER_BYTES.saturating_add(N) {
        return Err(Refused);
    }
    read(data, memory, HEADER_BYTES)
}

/// 5.1.6.5.2: two tables of addresses, each with its number of entries in front, and
/// nothing else.
fn check_tables(data: &Parts, memory: &GuestMemoryMmap<()>) -> Result<(), Refused> {
    let mut offset = HEADER_BYTES;
    for _ in 0..2 {
        let entries = u32::from_le_bytes(read(data, memory, offset)?);
        offset = usize::try_from(entries)
            .ok()
            .and_then(|entries| entries.checked_mul(MAC_BYTES))
            .and_then(|bytes| bytes.checked_add(4))
            .and_then(|bytes| bytes.checked_add(offset))
            .filter(|end| *end <= data.len())
            .ok_or(Refused)?;
    }
    if offset == data.len() {
        Ok(())
    } else {
        Err(Refused)
    }
}
