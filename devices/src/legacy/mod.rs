//! Devices of the PC that a virtual machine still needs.

mod cmos;
mod console;
mod power;
mod serial;

pub use cmos::Cmos;
pub use console::{ConsoleOptions, ConsoleOutput};
pub use power::{AcpiPower, I8042, PowerControl};
pub use serial::SerialPort;
