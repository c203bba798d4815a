//! The ways in which a guest resets or switches itself off.

use std::fmt;
use std::sync::Arc;

use crate::bus::BusDevice;

/// What the guest asked for; called on a vCPU's thread, must not wait for it.
pub trait PowerControl: Send + Sync + fmt::Debug {
    /// Start anew.
    fn reset(&self);

    /// Switch off.
    fn power_off(&self);
}

/// The keyboard controller, without keyboard: only its reset line is connected.
#[derive(Debug)]
pub struct I8042 {
    power: Arc<dyn PowerControl>,
}

impl I8042 {
    /// First port.
    pub const PORT: u64 = 0x60;
    /// Ports taken.
    pub const PORTS: u64 = 5;

    const COMMAND: u64 = 4;
    const PULSE_RESET: u8 = 0xfe;

    /// A controller whose reset line leads to `power`.
    #[must_use]
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Self { power }
    }
}

impl BusDevice for I8042 {
    /// Buffers empty, nothing to read: a driver that waits for either goes on at once.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == Self::COMMAND && data == [Self::PULSE_RESET] {
            self.power.reset();
        }
    }
}

/// The sleep and reset registers that the FADT of a hardware-reduced ACPI platform names
/// (ACPI 6.4, 4.8.3.6 and 4.8.3.7).
#[derive(Debug)]
pub struct AcpiPower {
    power: Arc<dyn PowerControl>,
}

impl AcpiPower {
    /// First port.
    pub const PORT: u64 = 0x600;
    /// Ports taken.
    pub const PORTS: u64 = 4;
    /// Offset of the sleep control register.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of the sleep status register.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of the reset register.
    pub const RESET: u64 = 2;
    /// What to write to the reset register.
    pub const RESET_VALUE: u8 = 1;
    /// Sleep type of soft-off, as `_S5` must say.
    pub const SLEEP_TYPE_OFF: u8 = 5;

    const SLEEP_ENABLE: u8 = 1 << 5;

    /// Registers that lead to `power`.
    #[must_use]
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Self { power }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const OFF: u8 = AcpiPower::SLEEP_TYPE_OFF << 2 | AcpiPower::SLEEP_ENABLE;
        match (offset, data) {
            (Self::SLEEP_CONTROL, [OFF]) => self.power.power_off(),
            (Self::RESET, [Self::RESET_VALUE]) => self.power.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Asked(Mutex<Vec<&'static str>>);

    impl PowerControl for Asked {
        fn reset(&self) {
            self.0.lock().unwrap().push("reset");
        }

        fn power_off(&self) {
            self.0.lock().unwrap().push("off");
        }
    }

    #[test]
    fn only_the_reset_pulse_resets() {
        let asked = Arc::new(Asked::default());
        let device = I8042::new(asked.clone());
        for value in 0..=u8::MAX {
            for offset in 0..I8042::PORTS {
                device.write(offset, &[value]);
            }
        }
        device.write(4, &[0xfe, 0xfe]);
        assert_eq!(*asked.0.lock().unwrap(), ["reset"]);
        let mut status = [0xff];
        device.read(4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn acpi_registers_reset_and_switch_off() {
        let asked = Arc::new(Asked::default());
        let device = AcpiPower::new(asked.clone());
        device.write(AcpiPower::SLEEP_CONTROL, &[5 << 2]);
        device.write(AcpiPower::SLEEP_CONTROL, &[1 << 5]);
        device.write(AcpiPower::SLEEP_STATUS, &[5 << 2 | 1 << 5]);
        device.write(AcpiPower::RESET, &[0]);
        assert!(asked.0.lock().unwrap().is_empty());
        device.write(AcpiPower::SLEEP_CONTROL, &[5 << 2 | 1 << 5]);
        device.write(AcpiPower::RESET, &[1]);
        assert_eq!(*asked.0.lock().unwrap(), ["off", "reset"]);
    }
}
