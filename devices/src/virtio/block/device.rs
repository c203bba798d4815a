//! [`Block`]: activation, reset.

use std::sync::Arc;

use super::config::{BlockConfig, ConfigError};
use super::engine::uring::Ring;
use super::handler::UringHandler;
use super::queue::{Context, RequestQueue};
use super::slot::Slot;
use super::state::BlockState;
use super::{BlockHandle, Engine, EngineChoice, QUEUE_SIZE, worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, HandlerId, Runner, StateError,
    VirtioDevice, WorkerId, config,
};

/// A virtio block device; empty until something is attached through its handle. Dropping
/// it closes what is attached.
#[derive(Debug)]
pub struct Block {
    config: BlockConfig,
    slot: Arc<Slot>,
    queue_sizes: Vec<u16>,
    /// One per queue; none with the synchronous engine.
    rings: Vec<Ring>,
    active: Option<Active>,
}

/// Where the queues of an activation run.
#[derive(Debug)]
struct Active {
    runner: Arc<dyn Runner>,
    handlers: Vec<HandlerId>,
    workers: Vec<WorkerId>,
}

impl Block {
    /// Makes the device and chooses its engine.
    ///
    /// # Errors
    /// Names what cannot be built; io_uring is an error only when asked for.
    pub fn new(config: BlockConfig) -> Result<(Self, BlockHandle), ConfigError> {
        config.validate()?;
        let (rings, choice) = choose(&config)?;
        let slot = Arc::new(Slot::new(config.block_size, config.read_only, choice));
        let handle = BlockHandle::new(Arc::clone(&slot));
        let device = Self {
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues)],
            config,
            slot,
            rings,
            active: None,
        };
        Ok((device, handle))
    }

    #[cfg(test)]
    pub(super) fn config(&self) -> &BlockConfig {
        &self.config
    }

    /// Finishes the requests in flight; guest memory is not touched afterwards.
    fn stop(&mut self) {
        if let Some(active) = self.active.take() {
            for id in active.handlers {
                active.runner.remove(id);
            }
            for id in active.workers {
                active.runner.join(id);
            }
        }
    }

    fn start(
        &self,
        active: &mut Active,
        context: Context,
        queue: ActiveQueue,
    ) -> Result<(), ActivateError> {
        let index = queue.index;
        let ring = self.rings.get(usize::from(index)).cloned();
        let queue = RequestQueue::new(context, queue);
        if let Some(ring) = ring {
            let handler = UringHandler::new(queue, ring);
            let id = active
                .runner
                .add(Box::new(handler))
                .map_err(|source| ActivateError::Io {
                    what: "cannot watch a disk queue",
                    source,
                })?;
            active.handlers.push(id);
        } else {
            let name = format!("{}-q{index}", self.config.name);
            let work = Box::new(move |stop| worker::run(queue, &stop));
            let id = active
                .runner
                .spawn(&name, work)
                .map_err(|source| ActivateError::Io {
                    what: "cannot start the thread of a disk queue",
                    source,
                })?;
            active.workers.push(id);
        }
        Ok(())
    }
}

fn choose(config: &BlockConfig) -> Result<(Vec<Ring>, EngineChoice), ConfigError> {
    let sync = |reason| (Vec::new(), EngineChoice::Sync { reason });
    if config.engine == Engine::Sync {
        return Ok(sync("as configured".to_owned()));
    }
    let rings: Result<Vec<_>, _> = (0..config.queues).map(|_| Ring::new()).collect();
    match rings {
        Ok(rings) => Ok((rings, EngineChoice::Uring)),
        Err(reason) if config.engine == Engine::Uring => Err(ConfigError::Uring(reason)),
        Err(reason) => {
            tracing::info!(disk = %config.name, "no io_uring, using system calls: {reason}");
            Ok(sync(reason))
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config.space(self.slot.sectors()), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let got = activation.queues.len();
        if got == 0 {
            return Err(ActivateError::MissingQueues { got, needed: 1 });
        }
        let context = Context {
            memory: activation.memory,
            interrupt: Arc::clone(&activation.interrupt),
            slot: Arc::clone(&self.slot),
            id: self.config.id(),
            read_only: self.config.read_only,
            features: activation.features,
        };
        let mut active = Active {
            runner: activation.runner,
            handlers: Vec::new(),
            workers: Vec::new(),
        };
        let mut started = Ok(());
        for queue in activation.queues {
            started = self.start(&mut active, context.clone(), queue);
            if started.is_err() {
                break;
            }
        }
        self.active = Some(active);
        let started = started.and_then(|()| {
            self.slot
                .change
                .arm(activation.interrupt)
                .map_err(|source| ActivateError::Io {
                    what: "cannot notify the disk driver",
                    source,
                })
        });
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        self.slot.change.disarm();
        self.stop();
    }

    fn quiesce(&mut self) {
        self.slot.change.suspend();
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        BlockState::new(
            &self.config,
            self.slot.sectors(),
            self.slot.change.is_pending(),
        )
        .encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state = BlockState::decode(state, &self.config)?;
        self.slot
            .change
            .restored(state.change_pending || state.sectors != self.slot.sectors());
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
        self.slot.close();
    }
}
