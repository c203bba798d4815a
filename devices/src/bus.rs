//! What a bus needs of a device, be it memory-mapped or behind I/O ports.

/// A device with registers. Called by all vCPU threads at once.
pub trait BusDevice: Send + Sync + std::fmt::Debug {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the device's start.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) at `offset` from the device's start.
    fn write(&self, offset: u64, data: &[u8]);
}
