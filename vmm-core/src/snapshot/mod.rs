//! A machine at one moment: what clones are made from.
//!
//! [`crate::Machine::into_snapshot`] makes one, [`crate::Machine::restore`] any number of
//! machines from it. A snapshot is of one host: it holds the state of the host's own CPU.
//!
//! On disk it is a folder of three files: `state`, versioned and with a digest; `memory`,
//! with holes where the guest's memory is zero; and `chunks`, which lists what is in
//! `memory` with a digest each. One that was made over a *base*, an earlier snapshot, leaves
//! out what the base has: it names the base's folder, which has to stay where it is.

mod base;
mod bounded;
mod error;
mod file;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::transport::mmio::MmioState;
use serde::{Deserialize, Serialize};

pub(crate) use self::base::Base;
pub(crate) use self::bounded::at_most;
pub use self::error::SnapshotError;
use crate::arch;
use crate::config::{MAX_DISK_SLOTS, MAX_VCPUS};
use crate::machine::LegacyState;
use crate::memory::{self, ChunkList, MemoryDigest, MemoryImage, RamSize};

const STATE: &str = "state";
const MEMORY: &str = "memory";
const CHUNKS: &str = "chunks";

/// Everything but the memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) cmdline: String,
    pub(crate) memory: RamSize,
    #[serde(deserialize_with = "at_most::<{ MAX_VCPUS as usize }, _, _>")]
    pub(crate) vcpus: Vec<arch::VcpuState>,
    pub(crate) chips: arch::ChipsState,
    pub(crate) legacy: LegacyState,
    pub(crate) devices: Vec<MmioState>,
    /// Slot by slot.
    #[serde(deserialize_with = "at_most::<{ MAX_DISK_SLOTS }, _, _>")]
    pub(crate) disks: Vec<Option<MmioState>>,
}

/// What the file `state` holds; the machine's state is owned when it was read.
#[derive(Debug, Serialize, Deserialize)]
struct Stored<M = MachineState> {
    label: String,
    memory: MemoryDigest,
    /// Folder of the snapshot that has the rest of the memory.
    base: Option<PathBuf>,
    machine: M,
}

/// See the module. Clones of this value share everything.
#[derive(Clone, Debug)]
pub struct Snapshot {
    state: Arc<MachineState>,
    memory: MemoryImage,
}

impl Snapshot {
    pub(crate) fn new(state: MachineState, memory: MemoryImage) -> Self {
        Self {
            state: Arc::new(state),
            memory,
        }
    }

    pub(crate) fn state(&self) -> &MachineState {
        &self.state
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &MemoryImage {
        &self.memory
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.state.vcpus.len()).unwrap_or(u32::MAX)
    }

    /// Size of the guest's memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.state.memory.boot_bytes
    }

    /// Writes the snapshot to an empty folder, files of mode 0600. `label` says what it is
    /// of: only who names the same label can load it. On disk when this returns.
    ///
    /// # Errors
    /// As the file operations; what was written until then stays.
    pub fn store(&self, dir: &Path, label: &str) -> Result<(), SnapshotError> {
        store(dir, label, &self.state, None, |file, _| {
            self.memory.write_to(file)
        })
    }

    /// Reads what [`Self::store`] wrote, into memory of this process: the files may go
    /// afterwards.
    ///
    /// # Errors
    /// A file that is missing, damaged, of another version or of another `label`.
    pub fn load(dir: &Path, label: &str) -> Result<Self, SnapshotError> {
        let (state, stored) = base::open(dir, label)?;
        let memory =
            MemoryImage::load(&stored).map_err(SnapshotError::file("read", &dir.join(MEMORY)))?;
        Ok(Self::new(state, memory))
    }

    /// Opens what [`Self::store`] wrote. Memory is read and checked when a machine made
    /// from it first needs it: files that are removed meanwhile stay until then, files that
    /// are changed end the machine. On a host without userfaultfd(2) it is read now.
    ///
    /// # Errors
    /// As [`Self::load`], but for the content of the memory.
    pub fn open(dir: &Path, label: &str) -> Result<Self, SnapshotError> {
        if !memory::can_be_lazy() {
            return Self::load(dir, label);
        }
        let (state, stored) = base::open(dir, label)?;
        Ok(Self::new(state, MemoryImage::open(stored)))
    }
}

/// What `bytes` would be written as, if they can be read.
#[cfg(feature = "fuzzing")]
pub(crate) fn rewrite(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let stored = file::parse(bytes)?;
    let content = postcard::to_stdvec(&stored).map_err(io::Error::other)?;
    Ok(file::seal(&content))
}

/// The file `state` around any content.
#[cfg(feature = "fuzzing")]
pub(crate) fn seal(content: &[u8]) -> Vec<u8> {
    file::seal(content)
}

/// Writes the files of a snapshot, the one without which the others are nothing last.
/// `write_memory` is given the chunks that the base has.
pub(crate) fn store(
    dir: &Path,
    label: &str,
    machine: &MachineState,
    base: Option<&Base>,
    write_memory: impl FnOnce(&File, Option<&ChunkList>) -> io::Result<ChunkList>,
) -> Result<(), SnapshotError> {
    let path = dir.join(MEMORY);
    let failed = |path: &Path| SnapshotError::file("write", path);
    let file = create(&path).map_err(failed(&path))?;
    let chunks = write_memory(&file, base.map(Base::chunks)).map_err(failed(&path))?;
    file.sync_all().map_err(failed(&path))?;
    let path = dir.join(CHUNKS);
    let list = chunks.to_bytes();
    write_file(&path, &list).map_err(failed(&path))?;
    let stored = Stored {
        label: label.to_owned(),
        memory: MemoryDigest::of_list(&list),
        base: base.map(|base| base.dir().to_owned()),
        machine,
    };
    let path = dir.join(STATE);
    file::to_bytes(&stored)
        .and_then(|bytes| write_file(&path, &bytes))
        .map_err(failed(&path))?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed(dir))
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut file = create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}
