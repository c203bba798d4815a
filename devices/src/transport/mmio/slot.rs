//! A place on the bus where a device can be plugged in while the guest runs.

use std::sync::{Arc, Mutex, PoisonError};

use super::MmioTransport;
use super::registers as reg;
use crate::bus::BusDevice;

/// Registers of a device that is there or not. An empty slot reads as the placeholder that
/// drivers skip (virtio 1.2, 4.2.2.2: device id 0); a driver that is bound to it after a
/// device was plugged in finds that.
#[derive(Debug, Default)]
pub struct MmioSlot {
    plugged: Mutex<Option<Arc<MmioTransport>>>,
}

impl MmioSlot {
    /// An empty slot.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Plugs a device in, in place of the one before, which is returned.
    pub fn plug(&self, transport: Arc<MmioTransport>) -> Option<Arc<MmioTransport>> {
        self.replace(Some(transport))
    }

    /// Takes the device out. It runs on until it is reset or dropped.
    pub fn unplug(&self) -> Option<Arc<MmioTransport>> {
        self.replace(None)
    }

    fn replace(&self, plugged: Option<Arc<MmioTransport>>) -> Option<Arc<MmioTransport>> {
        let mut slot = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *slot, plugged)
    }

    /// A vCPU that uses the device does not keep others from it, nor an unplug.
    fn plugged(&self) -> Option<Arc<MmioTransport>> {
        let slot = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }
}

impl BusDevice for MmioSlot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(transport) = self.plugged() {
            return transport.read(offset, data);
        }
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            let value = match offset {
                reg::MAGIC_VALUE => reg::MAGIC,
                reg::VERSION => reg::MMIO_VERSION,
                _ => 0,
            };
            *data = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(transport) = self.plugged() {
            transport.write(offset, data);
        }
    }
}
