//! One turn of the event loop on one virtqueue, for devices that answer each request at
//! once.

use std::io;

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::chain::{ChainError, Outside};
use super::notify::{self, QueueError};
use super::{ActiveQueue, GuestMemory, Interrupt};

/// A descriptor chain as [`serve`] hands it out.
pub(crate) type Descriptors<'a> = DescriptorChain<&'a GuestMemoryMmap<()>>;

/// What a device does with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Give it back with this many bytes written.
    Used(u32),
    /// Leave it available, and stop: it cannot be answered now.
    Later,
}

/// The driver broke a rule that only a device reset can mend, or the host failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Outside(#[from] Outside),
    #[error("{0}")]
    Request(String),
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl From<virtio_queue::Error> for ServeError {
    fn from(err: virtio_queue::Error) -> Self {
        Self::Queue(QueueError::Ring(err))
    }
}

/// Answers at most `budget` chains, interrupts the driver when any was used, and notifies
/// the queue itself when more may be waiting, so that other handlers get their turn.
///
/// No chain is in flight between two calls: the position in the available ring is always
/// the one in the used ring, and a saved VM needs no state per queue.
pub(crate) fn serve(
    memory: &GuestMemory,
    active: &mut ActiveQueue,
    interrupt: &dyn Interrupt,
    budget: usize,
    mut answer: impl FnMut(&GuestMemoryMmap<()>, Descriptors<'_>) -> Result<Answer, ServeError>,
) -> Result<(), ServeError> {
    let memory: &GuestMemoryMmap<()> = memory;
    let mut used = false;
    let mut more = true;
    for _ in 0..budget {
        // An impossible available index is an error, not an empty queue.
        let Some(chain) = active.queue.iter(memory)?.next() else {
            more = false;
            break;
        };
        let head = chain.head_index();
        match answer(memory, chain)? {
            Answer::Used(written) => {
                active.queue.add_used(memory, head, written)?;
                used = true;
            }
            Answer::Later => {
                active.queue.go_to_previous_position();
                more = false;
                break;
            }
        }
    }
    if more {
        active.notify.write(1).map_err(|source| ServeError::Io {
            what: "cannot wake the event loop",
            source,
        })?;
    }
    if used {
        notify::used(memory, active, interrupt)?;
    }
    Ok(())
}
