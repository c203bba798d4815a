//! [`Net`]: activation, reset.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};

use super::control::ControlQueue;
use super::handler::{NetHandler, Pair};
use super::link::{AttachError, Link, Settings};
use super::rx::RxQueue;
use super::tx::TxQueue;
use super::{ConfigError, NetConfig, NetHandle, NetState, QUEUE_SIZE, RestoreError};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, GuestMemory, HandlerId, Runner,
    VirtioDevice, config,
};

/// A virtio network device; its link is down until a tap is attached through its handle.
/// Dropping it closes the tap.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    link: Arc<Link>,
    queue_sizes: Vec<u16>,
    /// The settings come from a snapshot: the next activation carries on with them.
    restored: bool,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Net {
    /// Makes the device.
    ///
    /// # Errors
    /// Names what cannot be built.
    pub fn new(config: NetConfig) -> Result<(Self, NetHandle), ConfigError> {
        config.validate()?;
        let settings = Settings::new(config.mac);
        Self::with(config, settings)
    }

    fn with(config: NetConfig, settings: Settings) -> Result<(Self, NetHandle), ConfigError> {
        let link = Link::new(settings).map_err(|err| ConfigError::System(err.to_string()))?;
        let link = Arc::new(link);
        let handle = NetHandle::new(Arc::clone(&link));
        // Pairs, and the control queue.
        let queues = usize::from(config.queue_pairs)
            .saturating_mul(2)
            .saturating_add(1);
        let device = Self {
            queue_sizes: vec![QUEUE_SIZE; queues],
            config,
            link,
            restored: false,
            active: None,
        };
        Ok((device, handle))
    }

    /// What a snapshot keeps. Queues hold nothing back between two turns of the event
    /// loop: save after [`VirtioDevice::reset`], or while the VM is paused.
    #[must_use]
    pub fn save(&self) -> NetState {
        NetState::new(&self.config, self.link.settings())
    }

    /// Makes the device of a snapshot, without a tap. Limits are taken from `host`, all
    /// that the driver knows from `state`; its next activation carries on with what the
    /// driver had set.
    ///
    /// # Errors
    /// When the state is damaged or of another version.
    pub fn restore(state: &NetState, host: &NetConfig) -> Result<(Self, NetHandle), RestoreError> {
        let (config, settings) = state.open(host)?;
        let (mut device, handle) = Self::with(config, settings)?;
        device.restored = true;
        Ok((device, handle))
    }

    /// The queues by role: pairs, and the control queue behind them (5.1.2).
    fn queues(
        &self,
        memory: &GuestMemory,
        queues: Vec<ActiveQueue>,
        features: u64,
    ) -> Result<(Vec<Pair>, Option<ControlQueue>), ActivateError> {
        let got = queues.len();
        let mut queues: BTreeMap<u16, ActiveQueue> = queues
            .into_iter()
            .map(|queue| (queue.index, queue))
            .collect();
        let has = |feature: u32| features & 1 << feature != 0;
        let possible = if has(VIRTIO_NET_F_MQ) {
            self.config.queue_pairs
        } else {
            1
        };
        let mut pairs = Vec::new();
        for index in 0..possible {
            let rx = index.saturating_mul(2);
            let (Some(rx), Some(tx)) = (queues.remove(&rx), queues.remove(&rx.saturating_add(1)))
            else {
                break;
            };
            pairs.push(Pair::new(
                RxQueue::new(memory, rx, has(VIRTIO_NET_F_MRG_RXBUF)),
                TxQueue::new(memory, tx),
            ));
        }
        if pairs.is_empty() {
            return Err(ActivateError::MissingQueues { got, needed: 2 });
        }
        let count = u16::try_from(pairs.len()).unwrap_or(1);
        let control = queues
            .remove(&possible.saturating_mul(2))
            .map(|queue| ControlQueue::new(memory, queue, features, count));
        Ok((pairs, control))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self
            .config
            .space(self.link.settings().mac, self.link.status());
        config::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let io = |what| move |source| ActivateError::Io { what, source };
        let features = activation.features;
        let (pairs, control) = self.queues(&activation.memory, activation.queues, features)?;
        if !std::mem::take(&mut self.restored) {
            let mac = self.config.mac;
            self.link
                .set(|settings| settings.start(mac, features))
                .map_err(|err| match err {
                    AttachError::Tap { what, source, .. } => ActivateError::Io { what, source },
                    other => io("cannot set up the tap")(std::io::Error::other(other)),
                })?;
        }
        let interrupt = Arc::clone(&activation.interrupt);
        let handler = NetHandler::new(interrupt, &self.config, &self.link, pairs, control)
            .map_err(io("cannot set up the network queues"))?;
        let id = activation
            .runner
            .add(Box::new(handler))
            .map_err(io("cannot watch the network queues"))?;
        self.active = Some((activation.runner, id));
        self.link.change.arm(activation.interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        self.link.change.disarm();
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
        self.link.close();
    }
}
