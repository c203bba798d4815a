//! Which device answers at which address.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use devices::bus::BusDevice;

/// An address space of devices, complete before the first vCPU runs.
#[derive(Debug, Default)]
pub struct Bus {
    by_start: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    end: u64,
    device: Arc<dyn BusDevice>,
}

/// The range is empty or taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range {0:#x?} is empty or overlaps another device's")]
pub struct RangeTaken(pub Range<u64>);

impl Bus {
    /// Gives `range` to `device`.
    ///
    /// # Errors
    /// When the range is empty or overlaps another's.
    pub fn insert(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeTaken> {
        let below = self.by_start.range(..range.end).next_back();
        if range.is_empty() || below.is_some_and(|(_, entry)| entry.end > range.start) {
            return Err(RangeTaken(range));
        }
        self.by_start.insert(
            range.start,
            Entry {
                end: range.end,
                device,
            },
        );
        Ok(())
    }

    /// Reads at `address`; where no device is, all bits are ones as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `address`; where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device that has all of `len` bytes at `address`.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let (start, entry) = self.by_start.range(..=address).next_back()?;
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        if end > entry.end {
            return None;
        }
        Some((&*entry.device, address.checked_sub(*start)?))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_their_offset() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100..0x110, device.clone()).unwrap();
        bus.write(0x104, &[1, 2]);
        assert_eq!(*device.0.lock().unwrap(), [(4, vec![1, 2])]);
        let mut data = [0; 2];
        bus.read(0x10e, &mut data);
        assert_eq!(data, [0xe; 2]);
    }

    #[test]
    fn outside_and_across_the_end_nobody_answers() {
        let mut bus = Bus::default();
        bus.insert(0x100..0x110, Arc::new(Recorder::default()))
            .unwrap();
        for address in [0, 0xff, 0x10f, 0x110, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            bus.write(address, &data);
            assert_eq!(data, [0xff; 2], "{address:#x}");
        }
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        let device = || Arc::new(Recorder::default());
        bus.insert(0x100..0x110, device()).unwrap();
        for range in [
            0x100..0x110,
            0x10f..0x111,
            0xff..0x101,
            0x104..0x105,
            0..0x200,
        ] {
            bus.insert(range, device()).unwrap_err();
        }
        bus.insert(0x200..0x200, device()).unwrap_err();
        bus.insert(0x110..0x111, device()).unwrap();
        bus.insert(0xff..0x100, device()).unwrap();
    }
}
