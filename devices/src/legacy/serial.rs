//! The first serial port, a 16550A, as the guest's console.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{self, NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::ConsoleOutput;
use crate::bus::BusDevice;

/// A port that only sends; nothing is ever received.
pub struct SerialPort {
    uart: Mutex<Uart>,
    irq: Irq,
    output: ConsoleOutput,
}

type Uart = Serial<Irq, NoEvents, ConsoleOutput>;

/// What a snapshot keeps of a [`SerialPort`]: its registers. A driver that waits for the
/// interrupt it has enabled would otherwise wait for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState(#[serde(with = "Registers")] SerialState);

/// The fields of [`SerialState`], which has no serialized form of its own.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the driver has sent to itself in loopback mode.
    in_buffer: Vec<u8>,
}

/// No port can have been saved like that, or its interrupt cannot be raised.
#[derive(Debug, thiserror::Error)]
#[error("cannot restore the serial port: {0}")]
pub struct SerialPortError(#[source] serial::Error<io::Error>);

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Irq(Arc<EventFd>);

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
        let irq = Irq(Arc::new(irq));
        Self {
            uart: Mutex::new(Serial::new(irq.clone(), output.clone())),
            irq,
            output,
        }
    }

    /// What a snapshot keeps.
    #[must_use]
    pub fn save(&self) -> SerialPortState {
        SerialPortState(self.lock().state())
    }

    /// Goes on as `state` says, and raises the interrupt when one was pending.
    ///
    /// # Errors
    /// See [`SerialPortError`]; the port stays as it was.
    pub fn restore(&self, state: &SerialPortState) -> Result<(), SerialPortError> {
        let (irq, output) = (self.irq.clone(), self.output.clone());
        let uart = Serial::from_state(&state.0, irq, NoEvents, output).map_err(SerialPortError)?;
        *self.lock() = uart;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // A lost interrupt or byte of the console must not end the guest.
            let _ = self.lock().write(offset, *byte);
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
    fn a_restored_port_still_interrupts() {
        let port = || {
            let irq = EventFd::new(EFD_NONBLOCK).unwrap();
            let console = ConsoleOutput::new(super::super::ConsoleOptions::default()).unwrap();
            let port = SerialPort::new(irq.try_clone().unwrap(), console.clone());
            (port, irq, console)
        };
        let (first, _, _) = port();
        first.write(INTERRUPT_ENABLE, &[2]);
        first.write(DATA, b"a");
        let bytes = postcard::to_stdvec(&first.save()).unwrap();
        let state: SerialPortState = postcard::from_bytes(&bytes).unwrap();
        let (second, irq, console) = port();
        second.restore(&state).unwrap();
        assert_eq!(second.save(), state);
        assert!(irq.read().unwrap() >= 1, "an interrupt was pending");
        second.read(INTERRUPT_ID, &mut [0]);
        second.write(DATA, b"b");
        assert!(irq.read().unwrap() >= 1);
        assert_eq!(console.tail(), "b");

        let impossible = SerialPortState(SerialState {
            in_buffer: vec![0; 65],
            ..state.0
        });
        second.restore(&impossible).unwrap_err();
        second.write(DATA, b"c");
        assert_eq!(console.tail(), "bc");
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
