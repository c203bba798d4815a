//! [`Balloon`]: features, config space, activation, saved state.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::handle::Shared;
use super::handler::{Handler, Queues};
use super::{BalloonError, BalloonHandle};
use crate::virtio::release::{PAGE_BYTES, PageReleaser};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, HandlerId, Runner, StateError,
    VirtioDevice, config, state,
};

/// `VIRTIO_BALLOON_F_STATS_VQ`, 5.5.3.
const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Entries per queue. Linux refuses to report pages to a queue of fewer than 32.
const QUEUE_SIZE: u16 = 128;
/// Inflate, deflate, statistics, free page hinting (never used), reporting (5.5.2).
///
/// All are there whatever is offered: the specification numbers them so, while Linux
/// numbers those that exist one after the other. Taking the enabled ones in order serves
/// both.
const QUEUE_SIZES: [u16; 5] = [QUEUE_SIZE; 5];

/// Offset of `actual` in config space (5.5.4), the only field that drivers write.
const ACTUAL_OFFSET: u64 = 4;

/// How to make a [`Balloon`].
#[derive(Clone, Copy, Debug)]
pub struct BalloonConfig {
    /// Memory of the guest, the limit of the target.
    pub memory_bytes: u64,
    /// Balloon size asked for from the start.
    pub target_bytes: u64,
    /// The guest may take pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest reports free pages.
    pub reporting: bool,
    /// The guest sends memory statistics on request.
    pub stats: bool,
}

impl BalloonConfig {
    /// An empty balloon with every feature, for a guest of `memory_bytes`.
    #[must_use]
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            memory_bytes,
            target_bytes: 0,
            deflate_on_oom: true,
            reporting: true,
            stats: true,
        }
    }
}

/// The only version of the state so far.
const STATE_VERSION: u16 = 1;

/// What a snapshot keeps of a balloon besides its configuration. No chain is ever in
/// flight: the statistics buffer that the device holds counts as available, and is read
/// again after a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Pages asked for.
    target_pages: u32,
    /// Pages in the balloon.
    actual_pages: u32,
    /// The driver has yet to be told of a change.
    change_pending: bool,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    releaser: Arc<dyn PageReleaser>,
    shared: Arc<Shared>,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Balloon {
    /// A balloon whose pages go back to the host through `releaser`.
    ///
    /// # Errors
    /// `InvalidInput` when the target is more than the memory; when the host has no more
    /// fds.
    pub fn new(
        config: BalloonConfig,
        releaser: Arc<dyn PageReleaser>,
    ) -> io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared::new(config.memory_bytes)?);
        let target = shared.check_target(config.target_bytes).map_err(invalid)?;
        shared.set_target_pages(target);
        let handle = BalloonHandle {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            config,
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

    fn reset_queues(&mut self) {
        self.shared.set_stats_agreed(false);
        self.shared.config_change.disarm();
        self.stop();
    }

    /// The queues that the driver enabled, by the features it agreed to.
    fn queues(queues: Vec<ActiveQueue>, features: u64) -> Result<Queues, ActivateError> {
        let stats = features & F_STATS_VQ != 0;
        let reporting = features & F_PAGE_REPORTING != 0;
        let got = queues.len();
        let needed = 2_usize
            .saturating_add(stats.into())
            .saturating_add(reporting.into());
        let mut queues = queues.into_iter();
        let mut next = || {
            queues
                .next()
                .ok_or(ActivateError::MissingQueues { got, needed })
        };
        Ok(Queues {
            inflate: next()?,
            deflate: next()?,
            stats: stats.then(&mut next).transpose()?,
            reporting: reporting.then(&mut next).transpose()?,
        })
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let optional = [
            (self.config.stats, F_STATS_VQ),
            (self.config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (self.config.reporting, F_PAGE_REPORTING),
        ];
        optional
            .into_iter()
            .filter(|(offered, _)| *offered)
            .fold(1 << VIRTIO_F_VERSION_1, |all, (_, feature)| all | feature)
    }

    /// `num_pages` and `actual` (5.5.4); what follows belongs to features not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [a, b, c, d] = self.shared.target_pages().to_le_bytes();
        let [e, f, g, h] = self.shared.actual_pages().to_le_bytes();
        config::read(&[a, b, c, d, e, f, g, h], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(pages)) = (offset, data.try_into()) {
            self.shared.set_actual_pages(u32::from_le_bytes(pages));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let queues = Self::queues(activation.queues, activation.features)?;
        let stats_agreed = queues.stats.is_some();
        let io = |what| move |source| ActivateError::Io { what, source };
        let handler = Handler {
            shared: Arc::clone(&self.shared),
            releaser: Arc::clone(&self.releaser),
            memory: activation.memory,
            interrupt: Arc::clone(&activation.interrupt),
            queues,
            stats_wanted: self
                .shared
                .stats_wanted()
                .map_err(io("cannot share the balloon's wake-up event"))?,
            stats_read: false,
        };
        let id = activation
            .runner
            .add(Box::new(handler))
            .map_err(io("cannot watch the balloon queues"))?;
        self.active = Some((activation.runner, id));
        self.shared.set_stats_agreed(stats_agreed);
        self.shared
            .config_change
            .arm(activation.interrupt)
            .map_err(io("cannot notify the balloon driver"))
    }

    /// Also empties the balloon: a driver that starts anew owns all its pages.
    fn reset(&mut self) {
        self.reset_queues();
        self.shared.set_actual_pages(0);
    }

    fn quiesce(&mut self) {
        self.shared.config_change.suspend();
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = State {
            target_pages: self.shared.target_pages(),
            actual_pages: self.shared.actual_pages(),
            change_pending: self.shared.config_change.is_pending(),
        };
        state::encode(DeviceType::Balloon, STATE_VERSION, &state)
    }

    /// The target is the saved one, whatever the configuration asks for.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: State = state::decode(DeviceType::Balloon, STATE_VERSION, state)?;
        let target_bytes = u64::from(state.target_pages).saturating_mul(PAGE_BYTES);
        let target = self
            .shared
            .check_target(target_bytes)
            .map_err(|err| StateError::mismatch(DeviceType::Balloon, err.to_string()))?;
        self.shared.set_target_pages(target);
        self.shared.set_actual_pages(state.actual_pages);
        self.shared.config_change.restored(state.change_pending);
        Ok(())
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset_queues();
    }
}

fn invalid(err: BalloonError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, err)
}
