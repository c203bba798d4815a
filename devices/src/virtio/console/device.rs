//! [`Console`]: config space, activation, saved state.

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::ConsoleHandle;
use super::handle::{Shared, Size};
use super::handler::Handler;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, HandlerId, Runner, VirtioDevice, config,
};

/// `VIRTIO_CONSOLE_F_SIZE` (5.3.3).
const F_SIZE: u64 = 1 << 0;

/// Receive, transmit (5.3.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// What a snapshot keeps of a console. The used rings in guest memory tell how far the
/// queues are; attached streams are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns of the terminal.
    pub columns: u16,
    /// Its rows.
    pub rows: u16,
    /// Bytes already written of the first chain in the transmit queue.
    pub sent_bytes: u64,
}

/// The device.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    active: Option<(Arc<dyn Runner>, HandlerId)>,
}

impl Console {
    /// A console of unknown size. Everything that the guest writes goes to `log`, which
    /// should not block: it is written to on the VM's event loop.
    ///
    /// # Errors
    /// When the host has no more fds.
    pub fn new(log: Option<Box<dyn Write + Send>>) -> io::Result<(Self, ConsoleHandle)> {
        let shared = Arc::new(Shared::new(log)?);
        let handle = ConsoleHandle {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            shared,
            active: None,
        };
        Ok((device, handle))
    }

    /// What a snapshot keeps; call while the vCPUs are paused.
    #[must_use]
    pub fn save(&self) -> ConsoleState {
        let state = self.shared.lock();
        ConsoleState {
            columns: state.size.columns,
            rows: state.size.rows,
            sent_bytes: u64::try_from(state.sent).unwrap_or(u64::MAX),
        }
    }

    /// The console as saved; activate it with the restored queues next.
    ///
    /// # Errors
    /// As [`Console::new`].
    pub fn restore(
        log: Option<Box<dyn Write + Send>>,
        state: ConsoleState,
    ) -> io::Result<(Self, ConsoleHandle)> {
        let (device, handle) = Self::new(log)?;
        {
            let mut shared = device.shared.lock();
            shared.size = Size {
                columns: state.columns,
                rows: state.rows,
            };
            shared.sent = usize::try_from(state.sent_bytes).unwrap_or(usize::MAX);
        }
        Ok((device, handle))
    }

    fn stop(&mut self) {
        self.shared.config_change.disarm();
        if let Some((runner, id)) = self.active.take() {
            runner.remove(id);
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | F_SIZE
    }

    /// `cols` and `rows` (5.3.4); what follows belongs to features not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.shared.lock().size;
        let [a, b] = size.columns.to_le_bytes();
        let [c, d] = size.rows.to_le_bytes();
        config::read(&[a, b, c, d], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let Activation {
            memory,
            queues,
            interrupt,
            runner,
            ..
        } = activation;
        let queues = <[ActiveQueue; 2]>::try_from(queues).map_err(|queues| {
            ActivateError::MissingQueues {
                got: queues.len(),
                needed: QUEUE_SIZES.len(),
            }
        })?;
        let io = |what| move |source| ActivateError::Io { what, source };
        let shared = Arc::clone(&self.shared);
        let handler = Handler::new(shared, memory, Arc::clone(&interrupt), queues)
            .map_err(io("cannot share the console's wake-up event"))?;
        let id = runner
            .add(Box::new(handler))
            .map_err(io("cannot watch the console queues"))?;
        self.active = Some((runner, id));
        self.shared.config_change.arm(interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.shared.lock().sent = 0;
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop();
    }
}
