//! Entropy source (virtio 1.2, 5.4).
//!
//! The driver chooses how much it asks for; the device chooses how much work it does:
//! at most [`MAX_REQUEST_BYTES`] per request and [`MAX_REQUESTS_PER_EVENT`] requests per
//! turn of the event loop, so that one guest cannot keep the loop or the host's pool busy.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{
    ActivateError, Activation, ActiveQueue, DeviceType, EventHandler, GuestMemory, HandlerId,
    Interest, Interrupt, Loop, Ready, Runner, VirtioDevice,
};

/// Most bytes given for one request; the driver asks again for more.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most requests answered before other handlers get their turn.
pub const MAX_REQUESTS_PER_EVENT: usize = 16;

const QUEUE_SIZE: u16 = 64;

/// The device: one request queue, no configuration space.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Rng {
    /// A device fed from the host's `/dev/urandom`.
    ///
    /// # Errors
    /// When that cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            source: Arc::new(File::open("/dev/urandom")?),
            active: None,
        })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let got = activation.queues.len();
        let queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or(ActivateError::MissingQueues { got, needed: 1 })?;
        let handler = Handler {
            source: Arc::clone(&self.source),
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
        };
        let id = activation
            .runner
            .add(Box::new(handler))
            .map_err(|source| ActivateError::Io {
                what: "cannot watch the entropy queue",
                source,
            })?;
        self.active = Some((activation.runner, id));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
    }
}

struct Handler {
    source: Arc<File>,
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Arc<dyn Interrupt>,
}

impl EventHandler for Handler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(
            self.queue.notify.as_raw_fd(),
            0,
            Interest {
                readable: true,
                writable: false,
            },
        )
    }

    fn ready(&mut self, lp: &mut dyn Loop, _token: u64, _ready: Ready) {
        let _ = self.queue.notify.read();
        if let Err(err) = self.serve() {
            lp.forget(self.queue.notify.as_raw_fd());
            self.interrupt.needs_reset(&format!("rng: {err}"));
        }
    }
}

impl Handler {
    fn serve(&mut self) -> Result<(), ServeError> {
        for _ in 0..MAX_REQUESTS_PER_EVENT {
            let memory: &GuestMemoryMmap<()> = &self.memory;
            // An impossible available index is an error, not an empty queue.
            let Some(chain) =
                virtio_queue::QueueOwnedT::iter(&mut self.queue.queue, memory)?.next()
            else {
                return self.signal();
            };
            let head = chain.head_index();
            let written = fill(&self.source, memory, chain)?;
            self.queue.queue.add_used(memory, head, written)?;
        }
        // More may be waiting: come back after the other handlers.
        self.queue.notify.write(1)?;
        self.signal()
    }

    fn signal(&mut self) -> Result<(), ServeError> {
        if self.queue.queue.needs_notification(&*self.memory)? {
            self.interrupt.used_queue(self.queue.index)?;
        }
        Ok(())
    }
}

/// Fills the chain's writable buffers, at most [`MAX_REQUEST_BYTES`]; returns how many
/// bytes were written. Read-only buffers are ignored (virtio 1.2, 5.4.6.1).
fn fill(
    mut source: &File,
    memory: &GuestMemoryMmap<()>,
    chain: DescriptorChain<&GuestMemoryMmap<()>>,
) -> Result<u32, ServeError> {
    let mut entropy = [0; MAX_REQUEST_BYTES];
    let mut written = 0_usize;
    for descriptor in chain.writable() {
        let room = entropy.len().saturating_sub(written);
        let want = usize::try_from(descriptor.len()).map_or(room, |len| len.min(room));
        let Some(bytes) = entropy.get_mut(..want) else {
            break;
        };
        if bytes.is_empty() {
            continue;
        }
        source.read_exact(bytes)?;
        memory.write_slice(bytes, descriptor.addr())?;
        written = written.saturating_add(want);
    }
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("invalid queue")]
    Queue(#[from] virtio_queue::Error),
    #[error("a buffer lies outside guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, DeviceDriver, RawDescriptor};

    fn active() -> DeviceDriver<Rng> {
        let mut driver = DeviceDriver::new(Rng::new().unwrap());
        driver.activate().unwrap();
        driver
    }

    #[test]
    fn fills_a_request() {
        let mut driver = active();
        let used = driver.request(0, &[Buffer::Writable(64)]);
        assert_eq!(used.len, 64);
        assert_ne!(used.data, vec![0; 64]);
        let again = driver.request(0, &[Buffer::Writable(64)]);
        assert_ne!(used.data, again.data);
    }

    #[test]
    fn a_request_is_bounded() {
        let mut driver = active();
        let used = driver.request(0, &[Buffer::Writable(1 << 20)]);
        assert_eq!(used.len as usize, MAX_REQUEST_BYTES);
        let used = driver.request(0, &[Buffer::Writable(4000), Buffer::Writable(4000)]);
        assert_eq!(used.len as usize, MAX_REQUEST_BYTES);
    }

    #[test]
    fn more_requests_than_one_turn_are_all_served() {
        let mut driver = active();
        for _ in 0..QUEUE_SIZE {
            driver.queues[0].add(&[Buffer::Writable(8)]);
        }
        driver.queues[0].kick();
        for _ in 0..QUEUE_SIZE {
            assert_eq!(driver.wait_used(0).len, 8);
        }
    }

    #[test]
    fn read_only_buffers_yield_nothing() {
        let mut driver = active();
        let used = driver.request(0, &[Buffer::Readable(vec![7; 32])]);
        assert_eq!(used.len, 0);
    }

    #[test]
    fn a_loop_of_descriptors_ends() {
        let mut driver = active();
        driver.queues[0].add_loop(4);
        driver.queues[0].kick();
        assert_eq!(driver.wait_used(0).len, 0);
    }

    #[test]
    fn a_bad_address_asks_for_a_reset_and_nothing_else() {
        let mut driver = active();
        driver.queues[0].add(&[Buffer::Raw(RawDescriptor {
            addr: 0xffff_ffff_ffff_f000,
            len: u32::MAX,
            flags: 2,
            next: 0,
        })]);
        driver.queues[0].kick();
        assert!(driver.wait_needs_reset().contains("outside guest memory"));
        assert!(driver.runner.failures().is_empty());
    }

    #[test]
    fn an_impossible_available_index_asks_for_a_reset() {
        let mut driver = active();
        driver.queues[0].set_avail_idx(QUEUE_SIZE + 1);
        driver.queues[0].kick();
        assert!(driver.wait_needs_reset().contains("invalid queue"));
    }

    #[test]
    fn reset_is_idempotent_and_activation_works_again() {
        let mut driver = active();
        driver.device.reset();
        driver.device.reset();
        driver.activate().unwrap();
        assert_eq!(driver.request(0, &[Buffer::Writable(8)]).len, 8);
    }
}
