//! The first serial port, a 16550A, as the guest's console.

use std::io;
use std::sync::{Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::ConsoleOutput;
use crate::bus::BusDevice;

/// A port that only sends; nothing is ever received.
pub struct SerialPort {
    uart: Mutex<Serial<Irq, NoEvents, ConsoleOutput>>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialPort {
    /// First port of COM1.
    pub const COM1: u64 = 0x3f8;
    /// Ports taken.
    pub const PORTS: u64 = 8;
    /// Interrupt line of COM1.
    pub const COM1_IRQ: u32 = 4;

    /// A port that sends to `output` and interrupts through `irq`.
    #[must_use]
    pub fn new(irq: EventFd, output: ConsoleOutput) -> Self {
        Self {
            uart: Mutex::new(Serial::new(Irq(irq), output)),
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
            *byte = uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
            // A lost interrupt or byte of the console must not end the guest.
            let _ = uart.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_ID: u64 = 2;
    const LINE_STATUS: u64 = 5;

    #[test]
    fn sends_and_interrupts_when_enabled() {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = ConsoleOutput::new(super::super::ConsoleOptions::default()).unwrap();
        let port = SerialPort::new(irq.try_clone().unwrap(), console.clone());
        let read = |offset| {
            let mut data = [0];
            port.read(offset, &mut data);
            data[0]
        };
        port.write(DATA, b"a");
        irq.read().unwrap_err();
        assert_eq!(read(LINE_STATUS) & 0x60, 0x60, "transmitter empty");
        port.write(INTERRUPT_ENABLE, &[2]);
        port.write(DATA, b"b");
        assert!(irq.read().unwrap() >= 1);
        assert_eq!(
            read(INTERRUPT_ID) & 0xf,
            2,
            "transmitter holding register empty"
        );
        assert_eq!(read(INTERRUPT_ID) & 0xf, 1, "nothing pending");
        assert_eq!(console.tail(), "ab");
    }

    #[test]
    fn no_access_panics() {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = ConsoleOutput::new(super::super::ConsoleOptions::default()).unwrap();
        let port = SerialPort::new(irq, console);
        for offset in 0..300 {
            for value in 0..=u8::MAX {
                port.write(offset, &[value]);
                port.read(offset, &mut [0]);
            }
            port.write(offset, &[0; 4]);
            port.read(offset, &mut [0; 8]);
        }
    }
}
