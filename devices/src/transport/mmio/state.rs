//! What a snapshot keeps of a transport and its device.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::interrupt::InterruptState;
use super::registers::{CONFIG_CHANGE, USED_BUFFER, status};
use super::{MmioTransport, Registers, StartError, State};
use crate::transport::queue::Position;
use crate::virtio::{Interrupt, StateError};

/// A transport as its driver sees it, and its device. Means the same on every host.
///
/// How far the queues are is not in here: a quiesced device has no chain in flight, so the
/// used rings in guest memory tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// As in the `DeviceID` register.
    pub(super) device_type: u32,
    pub(super) registers: Registers,
    pub(super) interrupt: InterruptState,
    /// What [`crate::virtio::VirtioDevice::save`] returned.
    pub(super) device: Vec<u8>,
}

impl MmioState {
    /// Whether the driver runs the device.
    fn runs(&self) -> bool {
        runs(&self.registers, self.interrupt.needs_reset)
    }
}

fn runs(registers: &Registers, needs_reset: bool) -> bool {
    registers.status & status::DRIVER_OK != 0 && !needs_reset
}

impl MmioTransport {
    /// Quiesces the device and returns what a snapshot keeps. No vCPU may run. The device
    /// stands still until [`Self::resume`], or a reset by its driver.
    ///
    /// # Errors
    /// When the device cannot be saved; it stands still all the same.
    pub fn save(&self) -> Result<MmioState, StateError> {
        let mut state = self.lock();
        state.device.quiesce();
        state.quiesced = true;
        Ok(MmioState {
            device_type: self.device_type as u32,
            registers: state.registers.clone(),
            interrupt: self.interrupt.save(),
            device: state.device.save()?,
        })
    }

    /// Lets a quiesced device go on where it was.
    ///
    /// # Errors
    /// When it cannot; the driver is asked for a reset, too.
    pub fn resume(&self) -> Result<(), StateError> {
        let mut state = self.lock();
        if !std::mem::take(&mut state.quiesced)
            || !runs(&state.registers, self.interrupt.wants_reset())
        {
            return Ok(());
        }
        self.go_on(&mut state)
            .inspect_err(|err| self.interrupt.needs_reset(&err.to_string()))
    }

    /// Takes a snapshot's state into this fresh transport, whose device is configured as
    /// the saved one was, and lets the device go on where that was. Guest memory and the
    /// interrupt controller have been restored before; no vCPU may run.
    ///
    /// # Errors
    /// When the state is damaged, or that of another device. The transport must be dropped
    /// or reset then.
    pub fn restore(&self, saved: &MmioState) -> Result<(), StateError> {
        let mut state = self.lock();
        if state.registers.status != 0 {
            return Err(StateError::InUse(self.device_type.name()));
        }
        self.check(&state, saved)?;
        state.device.restore(&saved.device)?;
        state.registers = saved.registers.clone();
        self.interrupt.restore(&saved.interrupt);
        if saved.runs() {
            self.go_on(&mut state)?;
        }
        self.interrupt.repeat().map_err(|source| StateError::Io {
            what: "cannot interrupt the driver",
            source,
        })
    }

    fn go_on(&self, state: &mut State) -> Result<(), StateError> {
        self.activate(state, Position::Used)
            .map_err(|err| match err {
                StartError::Queue(..) => StateError::invalid(self.device_type, err.to_string()),
                StartError::Notify(_, source) => StateError::Io {
                    what: "cannot share the notification of a queue",
                    source,
                },
                StartError::Device(err) => err.into(),
            })?;
        // Notifications may have been on their way. One too many does no harm.
        for index in (0_u32..).take(self.notifies.len()) {
            self.notify(index);
        }
        Ok(())
    }

    fn check(&self, state: &State, saved: &MmioState) -> Result<(), StateError> {
        let mismatch = |what: String| Err(StateError::mismatch(self.device_type, what));
        let invalid = |what: String| Err(StateError::invalid(self.device_type, what));
        if saved.device_type != self.device_type as u32 {
            return mismatch(format!("it is of type {}", saved.device_type));
        }
        let registers = &saved.registers;
        let sizes = registers.queues.iter().map(|queue| queue.max_size());
        if !sizes.eq(state.device.queue_sizes().iter().copied()) {
            return mismatch("other queues".to_owned());
        }
        let ordered = [
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ]
        .iter()
        .all(|(later, earlier)| registers.status & later == 0 || registers.status & earlier != 0);
        if registers.status & !status::BY_DRIVER != 0 || !ordered {
            return invalid(format!("status {:#x}", registers.status));
        }
        // Before FEATURES_OK a driver may have written anything.
        if registers.status & status::FEATURES_OK != 0 {
            let extra = registers.driver_features & !state.device.features();
            if extra != 0 {
                return mismatch(format!("features {extra:#x} are not offered"));
            }
            if registers.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
                return invalid("features of a legacy driver".to_owned());
            }
        }
        if saved.interrupt.status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return invalid(format!("interrupt status {:#x}", saved.interrupt.status));
        }
        Ok(())
    }
}
