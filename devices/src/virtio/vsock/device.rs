//! [`Vsock`]: config space, activation, reset.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::handler::{Connections, Handler};
use super::host::{Host, VsockHandle};
use super::muxer::Muxer;
use super::packet::CID_GUEST_MIN;
use super::queues::Queues;
use super::state::VsockState;
use crate::virtio::{
    ActivateError, Activation, DeviceType, HandlerId, Runner, StateError, VirtioDevice, config,
};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Receive and transmit.
const NEEDED_QUEUES: usize = 2;

/// `VIRTIO_VSOCK_F_STREAM`, 5.10.3.
const F_STREAM: u64 = 1;

/// How to make a [`Vsock`].
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's address, 3 to 2^32 - 2. Guests of one host may share it: nothing is
    /// routed by it.
    pub guest_cid: u32,
    /// Where to listen for `CONNECT` clients, and the prefix of the sockets that guests
    /// reach by port number (`<path>_<port>`). Without it only in-process streams exist.
    pub uds_path: Option<PathBuf>,
    /// Connections at a time, both directions together; more are refused.
    pub max_connections: usize,
}

impl VsockConfig {
    /// Connections allowed unless configured otherwise.
    pub const MAX_CONNECTIONS: usize = 1024;

    /// In-process streams only, default limits.
    #[must_use]
    pub fn new(guest_cid: u32) -> Self {
        Self {
            guest_cid,
            uds_path: None,
            max_connections: Self::MAX_CONNECTIONS,
        }
    }
}

/// A virtio socket device. Dropping it closes every stream and removes its socket file.
pub struct Vsock {
    config: VsockConfig,
    host: Arc<Host>,
    /// Of the driver that has started the device, here or before a snapshot.
    connections: Option<Arc<Connections>>,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Vsock {
    /// Makes the device and binds its socket, if it has one.
    ///
    /// # Errors
    /// `InvalidInput` for a reserved address; as bind(2) for the socket, with `AddrInUse`
    /// when the file exists.
    pub fn new(config: VsockConfig) -> io::Result<(Self, VsockHandle)> {
        let cid = u64::from(config.guest_cid);
        if cid < CID_GUEST_MIN || config.guest_cid == u32::MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "guest_cid {cid} is reserved: use {CID_GUEST_MIN} to {}",
                    u32::MAX - 1
                ),
            ));
        }
        let host = Host::new()?;
        if let Some(path) = &config.uds_path {
            host.bind(path)?;
        }
        let handle = VsockHandle::new(Arc::clone(&host));
        let device = Self {
            config,
            host,
            connections: None,
            active: None,
        };
        Ok((device, handle))
    }

    fn handler(&mut self, activation: Activation) -> io::Result<Handler> {
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let mut queues = queues.into_iter();
        let (Some(rx), Some(tx), event) = (queues.next(), queues.next(), queues.next()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let queues = Queues {
            memory,
            interrupt,
            rx,
            tx,
            event,
        };
        let connections = match &self.connections {
            Some(connections) => Arc::clone(connections),
            None => Arc::new(Connections::new(self.muxer()?)),
        };
        connections.keep(false);
        self.connections = Some(Arc::clone(&connections));
        Handler::new(queues, connections, Arc::clone(&self.host))
    }

    fn muxer(&self) -> io::Result<Muxer> {
        Muxer::new(
            u64::from(self.config.guest_cid),
            self.config.max_connections,
            Arc::clone(&self.host),
        )
    }

    fn stop(&mut self) {
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock")
            .field("config", &self.config)
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// The guest's address (5.10.4), its upper half zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let cid = u64::from(self.config.guest_cid).to_le_bytes();
        config::read(&cid, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let got = activation.queues.len();
        let in_order = (0..).zip(&activation.queues).all(|(i, q)| q.index == i);
        // A VMM may keep the event queue to itself.
        if got < NEEDED_QUEUES || !in_order {
            return Err(ActivateError::MissingQueues {
                got,
                needed: NEEDED_QUEUES,
            });
        }
        let runner = Arc::clone(&activation.runner);
        let io = |what| move |source| ActivateError::Io { what, source };
        let handler = self
            .handler(activation)
            .map_err(io("cannot set up the vsock connections"))?;
        let id = runner
            .add(Box::new(handler))
            .map_err(io("cannot add the vsock device to the event loop"))?;
        self.active = Some((runner, id));
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.connections = None;
    }

    /// Streams stay open: what is written to them waits.
    fn quiesce(&mut self) {
        if let Some(connections) = &self.connections {
            connections.keep(true);
        }
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let mut state = VsockState::new(self.config.guest_cid);
        if let Some(connections) = &self.connections {
            connections.lock().save(&mut state);
        }
        state.encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state = VsockState::decode(state, self.config.guest_cid)?;
        let mut muxer = self.muxer().map_err(|source| StateError::Io {
            what: "cannot set up the vsock connections",
            source,
        })?;
        muxer.restore(state);
        self.connections = Some(Arc::new(Connections::new(muxer)));
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        self.host.close();
    }
}
