//! The hostile guest.

use std::collections::BTreeMap;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use devices::testing::{Buffer, RawDescriptor, TestGuest, TestInterrupt, VirtQueueDriver};
use devices::virtio::{Activation, Interrupt, VirtioDevice};

use crate::InlineRunner;

/// Memory of a guest.
const MEMORY: u64 = 16 << 20;
/// Of it, what one input may use for queues and buffers.
const USABLE: u64 = 12 << 20;
/// Actions of one input.
const MAX_ACTIONS: usize = 64;
/// Elements of one chain.
const MAX_BUFFERS: usize = 6;
/// Bytes of one readable buffer.
const MAX_READABLE: u16 = 2048;
/// Bytes of one writable buffer.
const MAX_WRITABLE: u32 = 0x1_0000;
/// Turns of the event loop after which a device is taken to spin.
const MAX_TURNS: usize = 20_000;

const WRITE: u16 = 2;

/// What a target is after.
pub trait Subject {
    /// The device's type.
    type Device: VirtioDevice;

    /// Makes the device, for a guest with this memory.
    fn device(&mut self, guest: &TestGuest) -> Self::Device;

    /// A chain for `queue`: by default, anything.
    ///
    /// # Errors
    /// When the input ends.
    fn chain(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        let _ = queue;
        random_chain(input)
    }

    /// Something that the host does.
    ///
    /// # Errors
    /// When the input ends.
    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let _ = input;
        Ok(())
    }

    /// Milliseconds to wait for the device's own threads or asynchronous I/O after each
    /// action: zero where it has none.
    fn patience(&self) -> u16 {
        0
    }
}

/// Plays the guest that `data` describes against the subject's device.
pub fn run(subject: &mut impl Subject, data: &[u8]) {
    let guest = TestGuest::new(usize::try_from(MEMORY).unwrap());
    let device = subject.device(&guest);
    let mut play = Play {
        queues: Vec::new(),
        features: device.features(),
        device,
        guest,
        interrupt: Arc::default(),
        runner: Arc::default(),
        used_bytes: 0,
        rings_end: 0,
        honest: true,
    };
    let mut input = Unstructured::new(data);
    // An input that ends in the middle of an action is a shorter input.
    let _ = play.run(subject, &mut input);
    play.device.reset();
}

struct Play<D> {
    device: D,
    features: u64,
    guest: TestGuest,
    queues: Vec<Queue>,
    interrupt: Arc<TestInterrupt>,
    runner: Arc<InlineRunner>,
    used_bytes: u64,
    /// The queues lie below.
    rings_end: u64,
    /// The device has not been made to write to the queues: what is in them is its own.
    honest: bool,
}

struct Queue {
    driver: VirtQueueDriver,
    free: usize,
    /// By head: descriptors, and bytes of room when that is certain.
    chains: BTreeMap<u16, (usize, Option<u64>)>,
}

impl<D: VirtioDevice> Play<D> {
    fn run<S>(&mut self, subject: &mut S, input: &mut Unstructured<'_>) -> Result<()>
    where
        S: Subject<Device = D>,
    {
        if input.ratio(1, 4)? {
            self.features &= input.arbitrary::<u64>()?;
        }
        self.activate();
        for _ in 0..MAX_ACTIONS {
            if input.is_empty() || self.used_bytes > USABLE {
                break;
            }
            let queue = input.choose_index(self.queues.len().max(1))?;
            self.act(subject, queue, input)?;
            self.settle(subject.patience(), queue);
        }
        Ok(())
    }

    fn activate(&mut self) {
        let sizes = self.device.queue_sizes().to_vec();
        let guest = &self.guest;
        self.queues = sizes
            .iter()
            .map(|size| Queue {
                driver: VirtQueueDriver::new(guest, *size),
                free: usize::from(*size),
                chains: BTreeMap::new(),
            })
            .collect();
        self.used_bytes += sizes
            .iter()
            .map(|size| 32 * u64::from(*size) + 64)
            .sum::<u64>();
        self.rings_end = self.guest.alloc(0);
        self.honest = true;
        self.interrupt = Arc::default();
        let queues = (0..)
            .zip(&self.queues)
            .map(|(index, queue)| queue.driver.activate(index))
            .collect();
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.interrupt) as _;
        // A device may refuse a driver.
        let _ = self.device.activate(Activation {
            memory: self.guest.memory(),
            queues,
            interrupt,
            features: self.features,
            runner: Arc::clone(&self.runner) as _,
        });
    }

    fn act<S>(&mut self, subject: &mut S, at: usize, input: &mut Unstructured<'_>) -> Result<()>
    where
        S: Subject<Device = D>,
    {
        let action = input.int_in_range(0..=15)?;
        let Some(queue) = self.queues.get_mut(at) else {
            return subject.host(input);
        };
        match action {
            0..=6 => {
                let chain = subject.chain(at, input)?;
                self.honest &= !chain.iter().any(|buffer| match buffer {
                    Buffer::Raw(raw) => may_write(raw, self.rings_end),
                    _ => false,
                });
                self.used_bytes += queue.add(&chain);
                queue.driver.kick();
            }
            7 => queue.add_loop(input.int_in_range(1..=8)?),
            8 => queue.driver.set_avail_idx(input.arbitrary()?),
            9 => {
                let index = input.arbitrary()?;
                let raw = random_descriptor(input)?;
                self.honest &= !may_write(&raw, self.rings_end);
                queue.driver.write_descriptor(index, raw);
                // Of any chain, so what room there is is no longer certain.
                queue.chains.values_mut().for_each(|(_, room)| *room = None);
            }
            10 => queue.driver.publish(input.arbitrary()?),
            11 => queue.driver.kick(),
            12 => {
                let mut data = [0; 8];
                let len = input.int_in_range(0..=8)?;
                let data = data.get_mut(..len).unwrap_or_default();
                self.device.read_config(random_offset(input)?, data);
            }
            13 => {
                let offset = random_offset(input)?;
                let len = input.int_in_range(0..=8)?;
                self.device.write_config(offset, input.bytes(len)?);
            }
            14 => {
                self.device.reset();
                self.activate();
            }
            _ => subject.host(input)?,
        }
        Ok(())
    }

    /// Lets the device work until nothing more happens.
    fn settle(&mut self, patience: u16, queue: usize) {
        let turns = (0..MAX_TURNS).find(|_| !self.runner.turn(0));
        assert!(turns.is_some(), "the device never comes to rest");
        if patience > 0 && self.waiting(queue) {
            for _ in 0..patience {
                if !self.runner.turn(1) && !self.waiting(queue) {
                    break;
                }
            }
        }
        for queue in &mut self.queues {
            queue.take_used(self.honest);
        }
    }

    fn waiting(&self, queue: usize) -> bool {
        self.interrupt.needs_reset_reason().is_none()
            && self
                .queues
                .get(queue)
                .is_some_and(|queue| queue.driver.used_pending() == 0 && !queue.chains.is_empty())
    }
}

impl Queue {
    /// Bytes of memory it took; nothing is done when the table is full.
    fn add(&mut self, chain: &[Buffer]) -> u64 {
        if chain.is_empty() || chain.len() > self.free {
            return 0;
        }
        self.free -= chain.len();
        let head = self.driver.add(chain);
        self.chains.insert(head, (chain.len(), room(chain)));
        chain.iter().map(size).sum()
    }

    fn add_loop(&mut self, len: u16) {
        if usize::from(len) <= self.free {
            self.free -= usize::from(len);
            let head = self.driver.add_loop(len);
            self.chains.insert(head, (len.into(), Some(0)));
            self.driver.kick();
        }
    }

    fn take_used(&mut self, honest: bool) {
        // Once around the ring: a guest that lies about indices may see more.
        for _ in 0..1024 {
            let Some(used) = self.driver.pop_used() else {
                break;
            };
            if let Some((descriptors, room)) = self.chains.remove(&used.head) {
                self.free += descriptors;
                assert!(
                    !honest || room.is_none_or(|room| u64::from(used.len) <= room),
                    "the device wrote {} bytes into {room:?}",
                    used.len
                );
            }
        }
    }
}

/// Bytes for the device to write, unless descriptors as given make that unclear.
fn room(chain: &[Buffer]) -> Option<u64> {
    chain
        .iter()
        .map(|buffer| match buffer {
            Buffer::Readable(_) => Some(0),
            Buffer::Writable(len) => Some(u64::from(*len)),
            Buffer::Raw(raw) if raw.flags == 0 => Some(0),
            Buffer::Raw(raw) if raw.flags == WRITE => Some(u64::from(raw.len)),
            Buffer::Raw(_) => None,
        })
        .sum()
}

/// Whether a device may write below `end` for it: what a table of indirect descriptors has
/// is anybody's guess.
fn may_write(raw: &RawDescriptor, end: u64) -> bool {
    const INDIRECT: u16 = 4;
    raw.flags & INDIRECT != 0 || raw.flags & WRITE != 0 && raw.addr < end
}

fn size(buffer: &Buffer) -> u64 {
    16 + match buffer {
        Buffer::Readable(bytes) => u64::try_from(bytes.len()).unwrap_or(0),
        Buffer::Writable(len) => u64::from(*len),
        Buffer::Raw(_) => 0,
    }
}

/// A chain of anything.
///
/// # Errors
/// When the input ends.
pub fn random_chain(input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
    let count = input.int_in_range(1..=MAX_BUFFERS)?;
    (0..count).map(|_| random_buffer(input)).collect()
}

fn random_buffer(input: &mut Unstructured<'_>) -> Result<Buffer> {
    Ok(match input.int_in_range(0..=4)? {
        0 | 1 => {
            let len = usize::from(input.int_in_range(0..=MAX_READABLE)?).min(input.len());
            Buffer::Readable(input.bytes(len)?.to_vec())
        }
        2 | 3 => Buffer::Writable(input.int_in_range(0..=MAX_WRITABLE)?),
        _ => Buffer::Raw(random_descriptor(input)?),
    })
}

fn random_descriptor(input: &mut Unstructured<'_>) -> Result<RawDescriptor> {
    let addr = if input.arbitrary()? {
        input.int_in_range(0..=MEMORY + 0x1000)?
    } else {
        input.arbitrary()?
    };
    Ok(RawDescriptor {
        addr,
        len: input.arbitrary()?,
        flags: input.int_in_range(0..=7)?,
        next: input.arbitrary()?,
    })
}

fn random_offset(input: &mut Unstructured<'_>) -> Result<u64> {
    if input.ratio(7, 8)? {
        input.int_in_range(0..=0x100)
    } else {
        input.arbitrary()
    }
}
