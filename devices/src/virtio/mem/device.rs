//! [`Mem`]: config space, activation, saved state.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::handle::Shared;
use super::handler::Handler;
use super::region::{MAX_BLOCKS, Region};
use super::{MemError, MemHandle};
use crate::virtio::release::{PAGE_BYTES, PageReleaser};
use crate::virtio::{
    ActivateError, Activation, DeviceType, HandlerId, Runner, StateError, VirtioDevice, config,
    state,
};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (5.15.3): the driver does not even read unplugged
/// memory, which would take host memory.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZE: u16 = 64;

/// `struct virtio_mem_config` (5.15.4).
const CONFIG_BYTES: usize = 56;

/// How to make a [`Mem`]. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemConfig {
    /// First guest-physical address of the region. Linux can use only whole memory blocks
    /// of its own (128 MiB on x86-64), so align it to that.
    pub address: u64,
    /// Size of the region: the most that can ever be plugged.
    pub region_bytes: u64,
    /// What is plugged and unplugged at a time.
    pub block_bytes: u64,
    /// What the guest should have plugged from the start.
    pub requested_bytes: u64,
}

impl MemConfig {
    /// A block is a huge page of x86-64, so that unplugging one breaks up none.
    pub const BLOCK_BYTES: u64 = 2 << 20;

    /// A region with the default block size and nothing requested.
    #[must_use]
    pub fn new(address: u64, region_bytes: u64) -> Self {
        Self {
            address,
            region_bytes,
            block_bytes: Self::BLOCK_BYTES,
            requested_bytes: 0,
        }
    }

    /// Checks the geometry.
    fn region(&self) -> Result<Region, MemError> {
        let wrong = |field, value, rule| Err(MemError::Geometry { field, value, rule });
        let block = self.block_bytes;
        if !block.is_power_of_two() || block < PAGE_BYTES {
            return wrong(
                "block_bytes",
                block,
                "has to be a power of two of at least 4096",
            );
        }
        let whole = |bytes: u64| bytes.checked_rem(block) == Some(0);
        if !whole(self.address) {
            return wrong(
                "address",
                self.address,
                "has to be a multiple of block_bytes",
            );
        }
        if self.region_bytes == 0 || !whole(self.region_bytes) {
            return wrong(
                "region_bytes",
                self.region_bytes,
                "has to be a multiple of block_bytes above zero",
            );
        }
        if self.address.checked_add(self.region_bytes).is_none() {
            return wrong("region_bytes", self.region_bytes, "reaches past 2^64");
        }
        let count = self.region_bytes.checked_div(block).unwrap_or(0);
        match usize::try_from(count) {
            Ok(count) if self.region_bytes / block <= MAX_BLOCKS => {
                Ok(Region::new(self.address, block, count))
            }
            _ => wrong(
                "region_bytes",
                self.region_bytes,
                "has too many blocks: make block_bytes larger",
            ),
        }
    }
}

/// The only version of the state so far.
const STATE_VERSION: u16 = 1;

/// What a snapshot keeps of a memory device. No request is ever in flight, so the used
/// ring in guest memory tells how far the queue is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// First address of the region.
    address: u64,
    region_bytes: u64,
    block_bytes: u64,
    requested_bytes: u64,
    /// Plugged blocks: runs of (first, count), in order, none touching another.
    plugged: Vec<(u32, u32)>,
    /// The driver has yet to be told of a change.
    change_pending: bool,
}

/// The device.
#[derive(Debug)]
pub struct Mem {
    releaser: Arc<dyn PageReleaser>,
    shared: Arc<Shared>,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Mem {
    /// A device whose unplugged memory goes back to the host through `releaser`.
    ///
    /// # Errors
    /// [`MemError::Geometry`], [`MemError::TooLarge`], [`MemError::NotWholeBlocks`].
    pub fn new(
        config: &MemConfig,
        releaser: Arc<dyn PageReleaser>,
    ) -> Result<(Self, MemHandle), MemError> {
        let shared = Arc::new(Shared::new(config.region()?));
        shared.set_requested(config.requested_bytes)?;
        let handle = MemHandle {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            releaser,
            shared,
            active: None,
        };
        Ok((device, handle))
    }

    fn stop(&mut self) {
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | F_UNPLUGGED_INACCESSIBLE
    }

    /// 5.15.4. All of the region is always usable.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = {
            let region = self.shared.region();
            let (block, bytes) = (region.block_bytes, region.bytes());
            let (plugged, requested) = (region.plugged_bytes(), region.requested_bytes);
            // Second: `node_id`, of use only with VIRTIO_MEM_F_ACPI_PXM.
            [block, 0, region.address, bytes, bytes, plugged, requested]
        };
        let mut bytes = [0; CONFIG_BYTES];
        let (places, _) = bytes.as_chunks_mut();
        for (place, field) in places.iter_mut().zip(fields) {
            *place = field.to_le_bytes();
        }
        config::read(&bytes, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let got = activation.queues.len();
        let queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or(ActivateError::MissingQueues { got, needed: 1 })?;
        let handler = Handler {
            shared: Arc::clone(&self.shared),
            releaser: Arc::clone(&self.releaser),
            memory: activation.memory,
            interrupt: Arc::clone(&activation.interrupt),
            queue,
        };
        let id = activation
            .runner
            .add(Box::new(handler))
            .map_err(|source| ActivateError::Io {
                what: "cannot watch the memory request queue",
                source,
            })?;
        self.active = Some((activation.runner, id));
        self.shared
            .config_change
            .arm(activation.interrupt)
            .map_err(|source| ActivateError::Io {
                what: "cannot notify the memory driver",
                source,
            })
    }

    /// Plugged memory stays plugged: a new driver asks for its state or unplugs it all
    /// (5.15.5).
    fn reset(&mut self) {
        self.shared.config_change.disarm();
        self.stop();
    }

    fn quiesce(&mut self) {
        self.shared.config_change.suspend();
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let region = self.shared.region();
        // At most MAX_BLOCKS blocks: all fits.
        let fit = |blocks| u32::try_from(blocks).unwrap_or(u32::MAX);
        let state = State {
            address: region.address,
            region_bytes: region.bytes(),
            block_bytes: region.block_bytes,
            requested_bytes: region.requested_bytes,
            plugged: region
                .blocks
                .runs()
                .map(|run| (fit(run.start), fit(run.len())))
                .collect(),
            change_pending: self.shared.config_change.is_pending(),
        };
        state::encode(DeviceType::Mem, STATE_VERSION, &state)
    }

    /// The requested size is the saved one, whatever the configuration asks for.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: State = state::decode(DeviceType::Mem, STATE_VERSION, state)?;
        {
            let mut region = self.shared.region();
            let saved = (state.address, state.region_bytes, state.block_bytes);
            if saved != (region.address, region.bytes(), region.block_bytes) {
                return Err(StateError::mismatch(DeviceType::Mem, "another region"));
            }
            for (first, count) in &state.plugged {
                let run = usize::try_from(*first).ok().and_then(|first| {
                    let end = first.checked_add(usize::try_from(*count).ok()?)?;
                    Some(first..end)
                });
                if !run.is_some_and(|run| region.restore(run)) {
                    return Err(StateError::invalid(
                        DeviceType::Mem,
                        "plugged blocks outside the region, or twice",
                    ));
                }
            }
        }
        self.shared
            .set_requested(state.requested_bytes)
            .map_err(|err| StateError::invalid(DeviceType::Mem, err.to_string()))?;
        self.shared.config_change.restored(state.change_pending);
        Ok(())
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.reset();
    }
}
