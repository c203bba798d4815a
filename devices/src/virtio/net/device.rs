//! [`Net`]: activation, reset.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};

use super::control::ControlQueue;
use super::handler::{NetHandler, Pair};
use super::link::{AttachError, Link, Settings};
use super::rx::RxQueue;
use super::state::NetState;
use super::tx::TxQueue;
use super::{ConfigError, NetConfig, NetHandle, QUEUE_SIZE};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, GuestMemory, HandlerId, Runner, StateError,
    VirtioDevice, config,
};

/// A virtio network device; its link is down until a tap is attached through its handle.
/// Dropping it closes the tap.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    link: Arc<Link>,
    queue_sizes: Vec<u16>,
    /// A driver has made its settings, here or before a snapshot: the next activation
    /// carries on with them.
    has_settings: bool,
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
            has_settings: false,
            active: None,
        };
        Ok((device, handle))
    }

    /// Buffers collected for frames to come are not in flight: they are available again to
    /// whoever activates the device next.
    fn stop(&mut self) {
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
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
        self.stop();
        let io = |what| move |source| ActivateError::Io { what, source };
        let features = activation.features;
        let (pairs, control) = self.queues(&activation.memory, activation.queues, features)?;
        if !std::mem::take(&mut self.has_settings) {
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
        self.link
            .change
            .arm(activation.interrupt)
            .map_err(io("cannot notify the network driver"))
    }

    fn reset(&mut self) {
        self.link.change.disarm();
        self.stop();
        self.has_settings = false;
    }

    fn quiesce(&mut self) {
        self.link.change.suspend();
        self.has_settings |= self.active.is_some();
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        NetState::new(
            &self.config,
            self.link.status(),
            self.link.change.is_pending(),
            self.link.settings(),
        )
        .encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state = NetState::decode(state, &self.config)?;
        self.config.mac = state.mac;
        let settings = state.settings;
        self.link
            .set(|now| *now = settings)
            .map_err(|err| StateError::invalid(DeviceType::Net, err.to_string()))?;
        self.link
            .change
            .restored(state.change_pending || state.status != self.link.status());
        self.has_settings = true;
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
        self.link.close();
    }
}
