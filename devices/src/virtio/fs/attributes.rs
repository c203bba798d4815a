//! Attributes of files, to and from the guest.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, SetattrValid};
use rustix::fs::{Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::names::errno;

/// Bits of an inode number that stay what they are on the host.
const NUMBER_BITS: u32 = 48;

/// Keeps inode numbers of different host file systems apart. The guest sees one device
/// number for the whole share, and tools take two files with the same device and inode
/// number for one.
#[derive(Debug, Default)]
pub struct Devices(Mutex<HashMap<(u32, u32), u64>>);

impl Devices {
    /// Forgets all of them.
    pub fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The inode number `number` of the device of `stat`, as the guest is to see it: the
    /// same on the first device, with the device's position above it on others.
    pub fn number(&self, stat: &Statx, number: u64) -> u64 {
        if number >> NUMBER_BITS != 0 {
            return number;
        }
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let mut devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = devices.len() as u64;
        let position = match devices.get(&device) {
            Some(position) => *position,
            // More devices than bits: their numbers may collide, which is cosmetic.
            None if count >> (u64::BITS - NUMBER_BITS) != 0 => 0,
            None => *devices.entry(device).or_insert(count),
        };
        position << NUMBER_BITS | number
    }
}

/// The attributes as the FUSE server takes them, `st_ino` as the guest is to see it.
pub fn attributes(stat: &Statx, number: u64) -> stat64 {
    // The only way to a zeroed one without unsafe code: it has private padding.
    let mut attr = Entry::default().attr;
    attr.st_dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    attr.st_ino = number;
    attr.st_mode = stat.stx_mode.into();
    attr.st_nlink = stat.stx_nlink.into();
    attr.st_uid = stat.stx_uid;
    attr.st_gid = stat.stx_gid;
    attr.st_rdev = rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
    attr.st_size = signed(stat.stx_size);
    attr.st_blksize = stat.stx_blksize.into();
    attr.st_blocks = signed(stat.stx_blocks);
    attr.st_atime = stat.stx_atime.tv_sec;
    attr.st_atime_nsec = stat.stx_atime.tv_nsec.into();
    attr.st_mtime = stat.stx_mtime.tv_sec;
    attr.st_mtime_nsec = stat.stx_mtime.tv_nsec.into();
    attr.st_ctime = stat.stx_ctime.tv_sec;
    attr.st_ctime_nsec = stat.stx_ctime.tv_nsec.into();
    attr
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The times to set, if any.
///
/// # Errors
/// EINVAL for nanoseconds out of range (they have special values above it).
pub fn times(attr: &stat64, valid: SetattrValid) -> io::Result<Option<Timestamps>> {
    if !valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        return Ok(None);
    }
    let time = |set, now, tv_sec, tv_nsec: i64| {
        let special = |tv_nsec| Ok(Timespec { tv_sec: 0, tv_nsec });
        if valid.contains(now) {
            special(UTIME_NOW)
        } else if !valid.contains(set) {
            special(UTIME_OMIT)
        } else if (0..1_000_000_000).contains(&tv_nsec) {
            Ok(Timespec { tv_sec, tv_nsec })
        } else {
            Err(errno(libc::EINVAL))
        }
    };
    Ok(Some(Timestamps {
        last_access: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            attr.st_atime,
            attr.st_atime_nsec,
        )?,
        last_modification: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            attr.st_mtime,
            attr.st_mtime_nsec,
        )?,
    }))
}
