//! Operations as plain system calls.

use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::super::Backing;
use super::super::job::Operation;

/// Runs one operation to its end; returns the bytes moved by transfers.
pub(in super::super) fn run(backing: &Backing, operation: &Operation<'_>) -> io::Result<usize> {
    match *operation {
        Operation::Read { into, offset } => into.read_at(backing.fd(), offset),
        Operation::Write {
            from,
            offset,
            durable,
        } => from.write_at(backing.fd(), offset, durable),
        Operation::Flush => backing.file().sync_data().map(|()| 0),
        Operation::Allocate { mode, offset, len } => {
            allocate(backing, FallocateFlags::from_bits_retain(mode), offset, len)
        }
        Operation::Discard { offset, len } => discard(backing, offset, len),
        Operation::Fill {
            data,
            offset,
            durable,
        } => {
            let done = backing.file().write_at(data, offset)?;
            if durable {
                backing.file().sync_data()?;
            }
            Ok(done)
        }
    }
}

fn allocate(backing: &Backing, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<usize> {
    let signed =
        |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    fallocate(backing.fd(), mode, signed(offset)?, signed(len)?)?;
    Ok(0)
}

fn discard(backing: &Backing, offset: u64, len: u64) -> io::Result<usize> {
    if backing.is_block_device() {
        return backing.discard_blocks(offset, len).map(|()| 0);
    }
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(backing, mode, offset, len)
}
