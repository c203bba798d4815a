//! Device models for an external VMM: the back-end of vhost-user.
//!
//! A VMM keeps the transport towards its guest (PCI or MMIO) and tells us over a Unix socket
//! where guest memory and the queues are. The messages are parsed by the `vhost` crate; what
//! they may ask for is bounded here: the VMM is as little trusted as its guest.
//!
//! | file | idea |
//! |---|---|
//! | `server` | the socket: one front-end at a time, a thread that serves it |
//! | `backend` | the requests: features, memory, rings; when the device runs |
//! | `memory` | the memory table, and addresses of the front-end in it |
//! | `ring` | one queue as the front-end sets it up |
//! | `interrupt` | the front-end's call eventfds |
//!
//! A ring that the front-end stops (`GET_VRING_BASE`) quiesces the device, which then knows
//! all that its driver has set: a VMM that pauses or migrates stops its rings and starts them
//! again. `RESET_DEVICE`, `RESET_OWNER` and the end of the connection reset it. There is no
//! in-flight table: a quiesced device holds no chain. The front-end is not told of changes of
//! the configuration space, which the `vhost` crate has no message for.

mod backend;
mod interrupt;
mod memory;
mod ring;
mod server;
#[cfg(test)]
mod tests;

pub use self::server::VhostUserServer;
