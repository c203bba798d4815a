//! Console (virtio 1.2, 5.3): one port.
//!
//! What the guest writes goes to a log, and to whoever is attached. Towards an attached
//! stream there is backpressure both ways and no buffer of ours: output that the stream
//! does not take stays in the guest's queue, input that the guest has no buffers for stays
//! in the stream's socket. Without a stream, output goes to the log alone and never waits.
//!
//! | file | idea |
//! |---|---|
//! | `device` | [`Console`]: config space, activation, saved state |
//! | `handle` | [`ConsoleHandle`]: attach a stream, resize, from any thread |
//! | `handler` | the two queues and the stream on the event loop |
//! | `port` | bytes between chains, log and stream |

mod device;
mod handle;
mod handler;
mod port;

#[cfg(test)]
mod tests;

pub use device::Console;
pub use handle::ConsoleHandle;
pub use port::{MAX_INPUT_BYTES, MAX_TURN_BYTES};
