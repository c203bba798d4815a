//! The window through which the guest reaches files without a copy of them: virtio 1.2,
//! 5.11.6.4, and `FUSE_SETUPMAPPING` and `FUSE_REMOVEMAPPING` of the FUSE protocol.
//!
//! The guest says which part of a file it wants where in the window. Both are whole blocks,
//! as Linux has them, so that a guest decides little about how this process's address space
//! looks. What is mapped is opened anew, by the rules of the share: the guest's Linux names
//! no open file here, and has checked its own permissions.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::abi::virtio_fs::{
    RemovemappingIn, RemovemappingOne, SetupmappingFlags, SetupmappingIn,
};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, fstatfs};
use rustix::fs::{FileType, OFlags};
use serde::{Deserialize, Serialize};
use vm_memory::ByteValued;

use super::inodes::Inode;
use super::names::errno;
use super::share::Share;
use crate::virtio::SharedMemory;

/// Bytes of a block, as a power of two: the guest is told in INIT.
pub const BLOCK_SHIFT: u16 = 21;
/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 1 << BLOCK_SHIFT;

/// Of all windows of the process together. Each can cost two mappings of the process, of
/// which it has 65530 unless the host's `vm.max_map_count` says otherwise.
const MOST_BLOCKS: usize = 16 * 1024;
static BLOCKS: AtomicUsize = AtomicUsize::new(0);

/// One of [`MOST_BLOCKS`].
#[derive(Debug)]
struct Counted(());

impl Counted {
    fn new() -> io::Result<Self> {
        if BLOCKS.fetch_add(1, Ordering::Relaxed) >= MOST_BLOCKS {
            BLOCKS.fetch_sub(1, Ordering::Relaxed);
            return Err(errno(libc::ENOMEM));
        }
        Ok(Self(()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        BLOCKS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a block of the window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Number of the file.
    pub inode: u64,
    /// Where in the file.
    pub offset: u64,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Window {
    memory: Arc<SharedMemory>,
    /// By position, in blocks.
    blocks: Mutex<BTreeMap<u64, (Block, Counted)>>,
}

impl Window {
    /// An empty one of `bytes`, whole blocks.
    ///
    /// # Errors
    /// When the host has no address space for it.
    pub fn new(bytes: u64) -> io::Result<Self> {
        Ok(Self {
            memory: Arc::new(SharedMemory::reserve(bytes)?),
            blocks: Mutex::default(),
        })
    }

    /// The memory, for the machine and for system calls.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// What is mapped, by position.
    pub fn all(&self) -> Vec<(u64, Block)> {
        let blocks = self.lock();
        blocks
            .iter()
            .map(|(at, (block, _))| (*at, *block))
            .collect()
    }

    /// Puts `blocks` of `file` in the window, as many from `first` on as `blocks` says.
    fn map(&self, at: Range<u64>, first: Block, file: &File) -> io::Result<()> {
        let counted = at.clone().map(|_| Counted::new());
        let counted = counted.collect::<io::Result<Vec<_>>>()?;
        let bytes = at.end.saturating_sub(at.start).saturating_mul(BLOCK_BYTES);
        let mut blocks = self.lock();
        let start = at.start.saturating_mul(BLOCK_BYTES);
        self.memory
            .map(start, bytes, file, first.offset, first.writable)?;
        let mut block = first;
        for (at, counted) in at.zip(counted) {
            blocks.insert(at, (block, counted));
            block.offset = block.offset.saturating_add(BLOCK_BYTES);
        }
        Ok(())
    }

    fn unmap(&self, at: Range<u64>) -> io::Result<()> {
        let bytes = at.end.saturating_sub(at.start).saturating_mul(BLOCK_BYTES);
        let mut blocks = self.lock();
        self.memory
            .unmap(at.start.saturating_mul(BLOCK_BYTES), bytes)?;
        blocks.retain(|block, _| !at.contains(block));
        Ok(())
    }

    /// Takes everything out of it.
    pub fn clear(&self) {
        if !self.lock().is_empty()
            && let Err(err) = self.unmap(0..self.memory.bytes() >> BLOCK_SHIFT)
        {
            tracing::warn!(%err, "files stay mapped until their VM ends");
        }
    }

    /// The blocks from `start` on, if they are whole ones and inside.
    fn range(&self, start: u64, bytes: u64) -> io::Result<Range<u64>> {
        match start.checked_add(bytes) {
            Some(end)
                if bytes > 0
                    && end <= self.memory.bytes()
                    && (start | bytes).is_multiple_of(BLOCK_BYTES) =>
            {
                Ok(start >> BLOCK_SHIFT..end >> BLOCK_SHIFT)
            }
            _ => Err(errno(libc::EINVAL)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Block, Counted)>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the guest is to reach this file through the window.
pub fn suits(inode: &Inode) -> bool {
    // A file of an overlay becomes another one when it is first written to, and a mapping
    // stays with the old one. FUSE file systems may refuse to map at all.
    let unfit = |kind| kind == OVERLAYFS_SUPER_MAGIC || kind == FUSE_SUPER_MAGIC;
    inode.file_type() == FileType::RegularFile
        && fstatfs(inode).is_ok_and(|fs| !unfit(fs.filesystem_type()))
}

impl Share {
    /// Does what a request of `opcode` about `node` asks of the window; `None` when it is
    /// not about that, or there is no window.
    pub fn serve_window(&self, opcode: u32, node: u64, body: &[u8]) -> Option<io::Result<()>> {
        let window = self.window.as_ref()?;
        if opcode == Opcode::SetupMapping as u32 {
            Some(self.set_up(window, node, body))
        } else if opcode == Opcode::RemoveMapping as u32 {
            Some(remove(window, body))
        } else {
            None
        }
    }

    fn set_up(&self, window: &Window, inode: u64, body: &[u8]) -> io::Result<()> {
        let (asked, _) = take::<SetupmappingIn>(body)?;
        let flags = SetupmappingFlags::from_bits(asked.flags);
        let flags = flags.filter(|flags| !flags.is_empty());
        let flags = flags.ok_or_else(|| errno(libc::EINVAL))?;
        let at = window.range(asked.moffset, asked.len)?;
        let first = Block {
            inode,
            offset: asked.foffset,
            writable: flags.contains(SetupmappingFlags::WRITE),
        };
        self.put_in_window(window, at, first)
    }

    /// Maps a file again, as it was at block `at`.
    pub(super) fn map_again(&self, at: u64, block: Block) -> io::Result<()> {
        let no_window = || errno(libc::EINVAL);
        let window = self.window.as_ref().ok_or_else(no_window)?;
        let start = at.checked_mul(BLOCK_BYTES).ok_or_else(no_window)?;
        let at = window.range(start, BLOCK_BYTES)?;
        self.put_in_window(window, at, block)
    }

    fn put_in_window(&self, window: &Window, at: Range<u64>, first: Block) -> io::Result<()> {
        if !first.offset.is_multiple_of(BLOCK_BYTES) {
            return Err(errno(libc::EINVAL));
        }
        let inode = self.inodes.get(first.inode)?;
        if inode.file_type() != FileType::RegularFile {
            return Err(errno(libc::ENODEV));
        }
        let access = if first.writable {
            self.check_writable()?;
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        window.map(at, first, &self.reopen(&inode, access)?)
    }

    /// The memory of the window, if there is one.
    pub fn window_memory(&self) -> Option<&Arc<SharedMemory>> {
        self.window.as_ref().map(|window| window.memory())
    }

    /// Whether the guest is to reach `inode` through the window.
    pub fn is_direct(&self, inode: u64) -> bool {
        self.window.is_some() && self.inodes.get(inode).is_ok_and(|inode| suits(&inode))
    }
}

fn remove(window: &Window, body: &[u8]) -> io::Result<()> {
    let (RemovemappingIn { count }, mut rest) = take(body)?;
    for _ in 0..count {
        let (one, behind) = take::<RemovemappingOne>(rest)?;
        window.unmap(window.range(one.moffset, one.len)?)?;
        rest = behind;
    }
    Ok(())
}

/// The structure at the beginning of `bytes`, and what comes behind it.
fn take<T: ByteValued + Default>(bytes: &[u8]) -> io::Result<(T, &[u8])> {
    let mut value = T::default();
    let to = value.as_mut_slice();
    let (head, rest) = bytes
        .split_at_checked(to.len())
        .ok_or_else(|| errno(libc::EINVAL))?;
    to.copy_from_slice(head);
    Ok((value, rest))
}
