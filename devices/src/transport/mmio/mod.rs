//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).
//!
//! A register file over one device model. It knows no KVM: the machine puts it on its
//! bus, gives it an [`IrqLine`], and may let the kernel write the queues' notification
//! eventfds ([`MmioTransport::queue_notifies`]) instead of trapping the register.

mod interrupt;
mod registers;
mod runner;
mod slot;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::interrupt::IrqLine;
use self::interrupt::MmioInterrupt;
use self::registers::{self as reg, status};
use self::runner::Posting;
pub use self::slot::MmioSlot;
pub use self::state::MmioState;
use crate::bus::BusDevice;
use crate::transport::queue::{Position, QueueError, QueueRegisters, set_high, set_low};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, GuestMemory, Interrupt, Runner,
    VirtioDevice,
};

/// One virtio-mmio device.
#[derive(Debug)]
pub struct MmioTransport {
    device_type: DeviceType,
    state: Mutex<State>,
    interrupt: Arc<MmioInterrupt>,
    notifies: Vec<EventFd>,
    memory: GuestMemory,
    runner: Arc<dyn Runner>,
}

/// What a driver sets up, and the device it sets up.
#[derive(Debug)]
struct State {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    /// Stands still for a snapshot.
    quiesced: bool,
}

impl State {
    /// Length and address of the selected shared memory region: all ones if there is none
    /// (virtio 1.2, 4.2.2).
    fn shared_memory(&self) -> (u64, u64) {
        let region = match self.registers.shm_sel {
            0 => self.device.shared_memory(),
            _ => None,
        };
        region
            .and_then(|region| Some((region.bytes(), region.guest_address()?)))
            .unwrap_or((u64::MAX, u64::MAX))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            shm_sel: 0,
            queues: queue_sizes
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The selected queue while it may be set up: after the features are settled and
    /// before the device runs (virtio 1.2, 3.1.1).
    fn queue_to_set_up(&mut self) -> Option<&mut QueueRegisters> {
        let phase = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        if self.status & phase != status::FEATURES_OK {
            return None;
        }
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

impl MmioTransport {
    /// Bytes of address space.
    pub const BYTES: u64 = 0x1000;
    /// Offset of the register to which drivers write the index of a queue to be served.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Offset of the device's configuration space.
    pub const CONFIG: u64 = 0x100;

    /// A transport for `device`, whose work happens on `runner`.
    ///
    /// # Errors
    /// When there are no fds for the queues' notifications.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        runner: Arc<dyn Runner>,
        line: Arc<dyn IrqLine>,
    ) -> io::Result<Self> {
        let device_type = device.device_type();
        let notifies = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        let registers = Registers::new(device.queue_sizes());
        Ok(Self {
            device_type,
            state: Mutex::new(State {
                device,
                registers,
                quiesced: false,
            }),
            interrupt: Arc::new(MmioInterrupt::new(device_type.name(), line)),
            notifies,
            memory,
            runner,
        })
    }

    /// One eventfd for each queue, in index order. Writing it notifies the device as
    /// writing the queue's index to [`Self::QUEUE_NOTIFY`] does.
    #[must_use]
    pub fn queue_notifies(&self) -> &[EventFd] {
        &self.notifies
    }

    /// Resets the device as its driver would: its work has stopped when this returns.
    pub fn reset(&self) {
        self.reset_locked(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic in a device the machine is torn down, which resets the device.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_locked(&self, state: &mut State) {
        state.device.reset();
        state.registers = Registers::new(state.device.queue_sizes());
        state.quiesced = false;
        self.interrupt.reset();
        for notify in &self.notifies {
            let _ = notify.read();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let state = self.lock();
        let registers = &state.registers;
        match offset {
            reg::MAGIC_VALUE => reg::MAGIC,
            reg::VERSION => reg::MMIO_VERSION,
            reg::DEVICE_ID => self.device_type as u32,
            reg::VENDOR_ID => reg::VENDOR,
            reg::DEVICE_FEATURES => half(state.device.features(), registers.device_features_sel),
            reg::QUEUE_NUM_MAX => registers.queue().map_or(0, |queue| queue.max_size().into()),
            reg::QUEUE_READY => registers.queue().is_some_and(|queue| queue.ready).into(),
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS if self.interrupt.wants_reset() => registers.status | status::NEEDS_RESET,
            reg::STATUS => registers.status,
            reg::SHM_LEN_LOW => half(state.shared_memory().0, 0),
            reg::SHM_LEN_HIGH => half(state.shared_memory().0, 1),
            reg::SHM_BASE_LOW => half(state.shared_memory().1, 0),
            reg::SHM_BASE_HIGH => half(state.shared_memory().1, 1),
            reg::CONFIG_GENERATION => self.interrupt.generation(),
            // Write-only or reserved.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            Self::QUEUE_NOTIFY => return self.notify(value),
            reg::INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            _ => {}
        }
        let mut state = self.lock();
        let registers = &mut state.registers;
        match offset {
            reg::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::DRIVER_FEATURES => registers.set_driver_features(value),
            reg::QUEUE_SEL => registers.queue_sel = value,
            reg::SHM_SEL => registers.shm_sel = value,
            reg::STATUS => self.set_status(&mut state, value),
            _ => {
                if let Some(queue) = registers.queue_to_set_up() {
                    set_up_queue(queue, offset, value);
                }
            }
        }
    }

    /// The driver has put buffers in queue `index`.
    fn notify(&self, index: u32) {
        let notify = usize::try_from(index)
            .ok()
            .and_then(|index| self.notifies.get(index));
        if let Some(notify) = notify {
            // A full counter is a notification not yet seen.
            let _ = notify.write(1);
        }
    }

    /// virtio 1.2, 2.1 and 3.1.1.
    fn set_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            return self.reset_locked(state);
        }
        let registers = &mut state.registers;
        // A driver must not clear bits: they stay.
        let mut new = value & status::BY_DRIVER & !registers.status;
        if new & status::FEATURES_OK != 0 {
            let offered = state.device.features();
            let acceptable = registers.driver_features & !offered == 0
                && registers.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
            // The driver reads the bit back to see whether it was accepted.
            if !acceptable || (registers.status | new) & status::DRIVER == 0 {
                new &= !status::FEATURES_OK;
            }
        }
        if (registers.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        registers.status |= new;
        if new & status::DRIVER_OK != 0
            && let Err(err) = self.activate(state, Position::Start)
        {
            self.interrupt.needs_reset(&err.to_string());
        }
    }

    fn activate(&self, state: &mut State, position: Position) -> Result<(), StartError> {
        state.quiesced = false;
        let features = state.registers.driver_features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for ((index, registers), notify) in
            (0_u16..).zip(&state.registers.queues).zip(&self.notifies)
        {
            if !registers.ready {
                continue;
            }
            let queue = registers
                .build(&self.memory, event_idx, position)
                .map_err(|err| StartError::Queue(index, err))?;
            let notify = notify
                .try_clone()
                .map_err(|err| StartError::Notify(index, err))?;
            queues.push(ActiveQueue {
                index,
                queue,
                notify,
            });
        }
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            features,
            runner: match position {
                Position::Start => Arc::clone(&self.runner),
                // A clone should not wait for each of its devices in turn.
                Position::Used | Position::At(_) => Arc::new(Posting(Arc::clone(&self.runner))),
            },
        };
        Ok(state.device.activate(activation)?)
    }
}

/// Why a device does not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {0}: {1}")]
    Queue(u16, #[source] QueueError),
    #[error("queue {0}: {1}")]
    Notify(u16, #[source] io::Error),
    #[error("activation: {0}")]
    Device(#[from] ActivateError),
}

impl Registers {
    fn set_driver_features(&mut self, value: u32) {
        // Settled once FEATURES_OK is set (virtio 1.2, 3.1.1).
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }
}

fn set_up_queue(queue: &mut QueueRegisters, offset: u64, value: u32) {
    match offset {
        reg::QUEUE_NUM => queue.set_size(value),
        reg::QUEUE_READY => queue.ready = value == 1,
        reg::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
        reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
        reg::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
        reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
        reg::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
        reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
        // Read-only or reserved.
        _ => {}
    }
}

/// 32 of 64 bits; there are none from 64 on.
fn half(value: u64, select: u32) -> u32 {
    let bits = match select {
        0 => value & u64::from(u32::MAX),
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(bits).unwrap_or(0)
}

impl BusDevice for MmioTransport {
    /// Registers are read by aligned 32-bit accesses (virtio 1.2, 4.2.2.2), configuration
    /// space by any; other accesses read zero.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(Self::CONFIG) {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                self.lock().device.read_config(offset, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(data) = <&mut [u8; 4]>::try_from(data)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// As [`Self::read`]; other accesses are ignored.
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(Self::CONFIG) {
            let mut state = self.lock();
            // Before DRIVER nobody drives the device (virtio 1.2, 3.1.1).
            if matches!(data.len(), 1 | 2 | 4 | 8) && state.registers.status & status::DRIVER != 0 {
                state.device.write_config(offset, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.reset();
    }
}
