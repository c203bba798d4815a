//! The device with a queue driver for a guest.

mod close;
mod guest;
mod hostile;
mod open;
mod snapshot;
mod transfer;
mod unix;
