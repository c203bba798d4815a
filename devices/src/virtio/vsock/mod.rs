//! Socket device: virtio 1.2, section 5.10, with the hybrid host side.
//!
//! The guest sees an ordinary virtio-vsock device. Towards the host there is no kernel
//! vsock: a connection ends in one half of a Unix stream socket pair. In-process callers
//! get the other half from [`VsockHandle`]; other processes connect to a Unix socket, say
//! `CONNECT <port>\n`, read `OK <host_port>\n` and then exchange raw bytes.
//!
//! Why a socket pair even inside one process, instead of channels:
//! * one code path: in-process streams, `CONNECT` clients and sockets that the guest
//!   reaches by port number are all "a stream socket that is ready or not";
//! * backpressure for free: the kernel bounds what is in flight, and readiness says when
//!   to go on, so that a slow reader stalls its own guest socket and nothing else;
//! * the kernel copies between the socket and guest memory directly, without a buffer
//!   of ours in between;
//! * an fd can be handed to another process, so callers need not know which process runs
//!   the device.
//!
//! | file | idea |
//! |---|---|
//! | `packet` | header, operations, flags (5.10.6) |
//! | `buffers` | a descriptor chain as checked slices of guest memory, socket I/O on them |
//! | `tx_buffer` | bytes that the guest sent and the host has not yet read |
//! | `connection` | state machine of one connection |
//! | `credit` | flow control (5.10.6.3) |
//! | `opener` | who on the host asked for a connection |
//! | `held` | connects of the guest that are answered later |
//! | `entry` | a connection on the event loop |
//! | `muxer` | all connections, what is to be sent to the guest, deadlines |
//! | `uds` | the Unix sockets of the hybrid model |
//! | `host` | [`VsockHandle`]: connect, listen, hold, transport reset |
//! | `queues` | the three virtqueues |
//! | `handler` | the fds on the event loop |
//! | `device` | [`Vsock`]: config space, activation, reset |
//! | `state` | what a snapshot keeps |

mod buffers;
mod connection;
mod credit;
mod deadlines;
mod device;
mod entry;
mod handler;
mod held;
mod host;
mod muxer;
mod opener;
mod packet;
mod queues;
mod state;
mod tx_buffer;
mod uds;

#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockConfig};
pub use host::VsockHandle;
