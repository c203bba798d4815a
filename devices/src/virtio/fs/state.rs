//! What a snapshot keeps of a share: the session with the guest.

use serde::{Deserialize, Serialize};

use super::share::Policy;
use super::window::{BLOCK_BYTES, Block};
use crate::virtio::{DeviceType, StateError, state};

/// Version 1 had no window.
const VERSION: u16 = 2;

/// Numbers are never used up: states say less than this.
const MAX_NUMBER: u64 = 1 << 62;
/// The longest path that the kernel takes, without its NUL.
const MAX_PATH_BYTES: usize = 4095;

/// Files are kept by path below the root, so that the root may be elsewhere, or a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    tag: String,
    read_only: bool,
    dax_bytes: u64,
    /// None before the driver has started.
    pub session: Option<Session>,
}

/// What the guest remembers and has open, by the numbers that it uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The guest collects writes.
    pub writeback: bool,
    /// The next number of a file.
    pub next_inode: u64,
    /// The next number of an open file.
    pub next_handle: u64,
    /// All but the root, by number.
    pub inodes: Vec<SavedInode>,
    /// By number.
    pub handles: Vec<SavedHandle>,
    /// What is in the window, by position.
    pub mappings: Vec<(u64, Block)>,
}

/// A file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedInode {
    pub id: u64,
    /// How often the guest has learnt of it.
    pub count: u64,
    /// None when it had no name any more.
    pub place: Option<Place>,
}

/// Where a file is, and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Below the root.
    pub path: Vec<u8>,
    /// The type bits of its mode.
    pub file_type: u32,
}

/// A file that the guest has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedHandle {
    pub id: u64,
    /// Number of the file.
    pub inode: u64,
    /// Flags of open(2) on the host.
    pub flags: u32,
}

impl FsState {
    pub fn new(tag: &str, policy: &Policy, session: Option<Session>) -> Self {
        Self {
            tag: tag.to_owned(),
            read_only: policy.read_only,
            dax_bytes: policy.dax_bytes,
            session,
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        state::encode(DeviceType::Fs, VERSION, self)
    }

    /// The state in `bytes`, if it is of a share like this.
    pub fn decode(bytes: &[u8], tag: &str, policy: &Policy) -> Result<Self, StateError> {
        let state: Self = state::decode(DeviceType::Fs, VERSION, bytes)?;
        let mismatch = |what| Err(StateError::mismatch(DeviceType::Fs, what));
        if state.tag != tag {
            return mismatch(format!("tag {:?}, here {tag:?}", state.tag));
        }
        if state.read_only != policy.read_only {
            return mismatch("read_only".to_owned());
        }
        if state.dax_bytes != policy.dax_bytes {
            return mismatch(format!(
                "dax_bytes = {}, here {}",
                state.dax_bytes, policy.dax_bytes
            ));
        }
        if let Some(session) = &state.session {
            if session.writeback && !policy.writeback {
                return mismatch("writeback".to_owned());
            }
            session
                .check(policy)
                .map_err(|what| StateError::invalid(DeviceType::Fs, what))?;
        }
        Ok(state)
    }
}

impl Session {
    fn check(&self, policy: &Policy) -> Result<(), &'static str> {
        if self.inodes.len() > policy.max_inodes || self.handles.len() > policy.max_handles {
            return Err("more files than this share allows");
        }
        let blocks = policy.dax_bytes.checked_div(BLOCK_BYTES).unwrap_or(0);
        if self.mappings.len() as u64 > blocks {
            return Err("more mappings than the window has room for");
        }
        let inodes = self.inodes.iter().map(|inode| inode.id);
        // The root has the first number.
        if !ascends(1, inodes, self.next_inode) || self.inodes.iter().any(|inode| inode.count == 0)
        {
            return Err("files");
        }
        let handles = self.handles.iter().map(|handle| handle.id);
        if !ascends(0, handles, self.next_handle) {
            return Err("open files");
        }
        let places = self.inodes.iter().filter_map(|inode| inode.place.as_ref());
        if !places.into_iter().all(Place::is_below_root) {
            return Err("paths");
        }
        Ok(())
    }
}

impl Place {
    /// Names separated by single slashes, none of them special.
    fn is_below_root(&self) -> bool {
        self.path.len() <= MAX_PATH_BYTES
            && !self.path.contains(&0)
            && self
                .path
                .split(|byte| *byte == b'/')
                .all(|name| !matches!(name, b"" | b"." | b".."))
    }
}

/// Whether `ids` go up strictly between `first` and `next`.
fn ascends(first: u64, ids: impl Iterator<Item = u64>, next: u64) -> bool {
    let mut last = first;
    for id in ids {
        if id <= last {
            return false;
        }
        last = id;
    }
    last < next && next <= MAX_NUMBER
}
