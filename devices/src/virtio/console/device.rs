//! [`Console`]: config space, activation, saved state.

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::ConsoleHandle;
use super::handle::{Shared, Size};
use super::handler::Handler;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, HandlerId, Runner, StateError,
    VirtioDevice, config, state,
};

/// `VIRTIO_CONSOLE_F_SIZE` (5.3.3).
const F_SIZE: u64 = 1 << 0;

/// Receive, transmit (5.3.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// The only version of the state so far.
const STATE_VERSION: u16 = 1;

/// What a snapshot keeps of a console. The used rings in guest memory tell how far the
/// queues are; attached streams are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Columns of the terminal.
    columns: u16,
    /// Its rows.
    rows: u16,
    /// Bytes already written of the first chain in the transmit queue.
    sent_bytes: u64,
    /// The driver has yet to be told of a change.
    change_pending: bool,
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

    fn stop(&mut self) {
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
        self.shared
            .config_change
            .arm(interrupt)
            .map_err(io("cannot notify the console driver"))
    }

    fn reset(&mut self) {
        self.shared.config_change.disarm();
        self.stop();
        self.shared.lock().sent = 0;
    }

    fn quiesce(&mut self) {
        self.shared.config_change.suspend();
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = {
            let shared = self.shared.lock();
            State {
                columns: shared.size.columns,
                rows: shared.size.rows,
                sent_bytes: u64::try_from(shared.sent).unwrap_or(u64::MAX),
                change_pending: self.shared.config_change.is_pending(),
            }
        };
        state::encode(DeviceType::Console, STATE_VERSION, &state)
    }

    /// The size is the saved one; whoever attaches a terminal says its own.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: State = state::decode(DeviceType::Console, STATE_VERSION, state)?;
        let sent = usize::try_from(state.sent_bytes)
            .map_err(|err| StateError::invalid(DeviceType::Console, err.to_string()))?;
        {
            let mut shared = self.shared.lock();
            shared.size = Size {
                columns: state.columns,
                rows: state.rows,
            };
            shared.sent = sent;
        }
        self.shared.config_change.restored(state.change_pending);
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
    }
}
