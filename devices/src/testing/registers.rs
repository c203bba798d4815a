use crate::bus::BusDevice;

/// Performs accesses as a guest could: whether to read, offset, width (0 to 8 bytes,
/// larger ones are cut) and value. For property tests and fuzz targets.
pub fn drive_registers(
    device: &dyn BusDevice,
    accesses: impl IntoIterator<Item = (bool, u64, usize, u64)>,
) {
    for (read, offset, width, value) in accesses {
        let mut data = value.to_le_bytes();
        let data = &mut data[..width.min(8)];
        if read {
            device.read(offset, data);
        } else {
            device.write(offset, data);
        }
    }
}
