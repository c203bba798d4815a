//! The files of a snapshot, and those of the snapshots below it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{CHUNKS, MEMORY, MachineState, STATE, SnapshotError, Stored, file};
use crate::memory::{ChunkList, MemoryDigest, RamSize, StoredMemory};

/// Most snapshots below one. Each is a file that stays open while its memory is read.
const MAX_DEPTH: usize = 32;

/// A snapshot that another can be made over.
#[derive(Debug)]
pub(crate) struct Base {
    dir: PathBuf,
    memory: Arc<StoredMemory>,
}

impl Base {
    /// Opens the snapshot in `dir`, of `label`, below one of a machine of this `size`.
    ///
    /// # Errors
    /// As [`super::Snapshot::open`]; the machine has another size; too many snapshots are
    /// below it already.
    pub(crate) fn open(dir: &Path, label: &str, size: RamSize) -> Result<Self, SnapshotError> {
        let failed = SnapshotError::file("make a snapshot over", dir);
        let dir = match std::path::absolute(dir) {
            Ok(dir) => dir,
            Err(err) => return Err(failed(err)),
        };
        let (_, memory) = open_below(&dir, label, 1)?;
        if memory.size() != size {
            let (found, wanted) = (memory.bytes(), size.total_bytes());
            return Err(failed(file::invalid(&format!(
                "its machine has {found} bytes of memory instead of {wanted}"
            ))));
        }
        Ok(Self {
            dir,
            memory: Arc::new(memory),
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn chunks(&self) -> &ChunkList {
        self.memory.chunks()
    }
}

/// Opens the snapshot in `dir` and all below it. The memory is not read.
pub(super) fn open(dir: &Path, label: &str) -> Result<(MachineState, StoredMemory), SnapshotError> {
    open_below(dir, label, 0)
}

fn open_below(
    dir: &Path,
    label: &str,
    depth: usize,
) -> Result<(MachineState, StoredMemory), SnapshotError> {
    let failed = |path: &Path| SnapshotError::file("read", path);
    let path = dir.join(STATE);
    let file = File::open(&path).map_err(failed(&path))?;
    let stored = file::read(&file).map_err(failed(&path))?;
    if stored.label != label {
        return Err(SnapshotError::Label {
            path,
            found: stored.label,
            wanted: label.to_owned(),
        });
    }
    let base = match &stored.base {
        Some(_) if depth == MAX_DEPTH => {
            return Err(failed(&path)(file::invalid(&format!(
                "more than {MAX_DEPTH} snapshots are below it; make one without a base"
            ))));
        }
        Some(base) => Some(Arc::new(
            open_below(base, label, depth.saturating_add(1))?.1,
        )),
        None => None,
    };
    let path = dir.join(CHUNKS);
    let chunks = read_chunks(&path, &stored).map_err(failed(&path))?;
    let path = dir.join(MEMORY);
    let file = File::open(&path).map_err(failed(&path))?;
    let size = stored.machine.memory;
    let memory = StoredMemory::new(file, size, chunks, base).map_err(failed(&path))?;
    Ok((stored.machine, memory))
}

fn read_chunks(path: &Path, stored: &Stored) -> io::Result<ChunkList> {
    let memory_bytes = stored.machine.memory.total_bytes();
    let limit = ChunkList::max_bytes(memory_bytes).saturating_add(1);
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    if MemoryDigest::of_list(&bytes) != stored.memory {
        return Err(file::invalid("the list of chunks does not have its digest"));
    }
    ChunkList::parse(&bytes, memory_bytes)
}
