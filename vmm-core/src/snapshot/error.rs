use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::virtio::StateError;

use crate::vm::ExitReason;

/// Why a machine could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Nothing is left to save.
    #[error("the VM is not running: {0}")]
    Exited(ExitReason),
    /// A vCPU did not leave the guest.
    #[error("pausing the vCPUs took longer than {0:?}")]
    Deadline(Duration),
    /// The machine has no memory: it was never finished.
    #[error("the VM has no memory")]
    NoMemory,
    /// KVM refused a step.
    #[error("KVM cannot {what}")]
    Kvm {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device cannot be saved.
    #[error(transparent)]
    Device(#[from] StateError),
    /// Guest memory.
    #[error("cannot {what} the guest's memory")]
    Memory {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One of the snapshot's files.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The step.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why; `InvalidData` when the content is not what was written.
        #[source]
        source: io::Error,
    },
    /// A snapshot of something else.
    #[error("{} is of {found:?}, not of {wanted:?}", path.display())]
    Label {
        /// Which file.
        path: PathBuf,
        /// What it is of.
        found: String,
        /// What was asked for.
        wanted: String,
    },
}

impl SnapshotError {
    pub(crate) fn memory(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Memory { what, source }
    }

    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}
