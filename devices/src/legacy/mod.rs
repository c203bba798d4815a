//! Devices of the PC that a virtual machine still needs.
//!
//! [`I8042`] and [`AcpiPower`] act at once and keep nothing, so a snapshot has nothing of
//! them.

mod cmos;
mod console;
mod power;
mod serial;

pub use cmos::{Cmos, CmosState};
pub use console::{ConsoleOptions, ConsoleOutput};
pub use power::{AcpiPower, I8042, PowerControl};
pub use serial::{SerialPort, SerialPortError, SerialPortState};
