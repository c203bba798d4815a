//! Extended attributes.
//!
//! They are reached through `/proc/self/fd`, because `O_PATH` descriptors do not take
//! them, and that link leads to the file itself, be it a symlink.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::{
    XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr,
};

use super::inodes::Inode;
use super::names::errno;

/// Limit of the kernel for one value, and for one list of names.
const MAX_BYTES: u32 = 64 * 1024;

/// The `trusted` names belong to the host's root: overlay file systems of the host would
/// believe what a guest writes there.
///
/// # Errors
/// EPERM for such a name.
fn check(name: &CStr) -> io::Result<()> {
    if name.to_bytes().starts_with(b"trusted.") {
        return Err(errno(libc::EPERM));
    }
    Ok(())
}

fn path(inode: &Inode) -> String {
    format!("/proc/self/fd/{}", inode.as_fd().as_raw_fd())
}

fn buffer(size: u32) -> Vec<u8> {
    vec![0; size.min(MAX_BYTES) as usize]
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Sets a value.
///
/// # Errors
/// As setxattr(2).
pub fn set(inode: &Inode, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    check(name)?;
    let flags = XattrFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
    Ok(setxattr(path(inode), name, value, flags)?)
}

/// Reads a value, or only its size when `size` is zero.
///
/// # Errors
/// As getxattr(2).
pub fn get(inode: &Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
    if size == 0 {
        let len = getxattr_query(path(inode), name)?;
        return Ok(GetxattrReply::Count(count(len)));
    }
    let mut value = buffer(size);
    let len = getxattr(path(inode), name, value.as_mut_slice())?;
    value.truncate(len);
    Ok(GetxattrReply::Value(value))
}

/// Lists the names, or only their size when `size` is zero.
///
/// # Errors
/// As listxattr(2).
pub fn list(inode: &Inode, size: u32) -> io::Result<ListxattrReply> {
    if size == 0 {
        let len = listxattr_query(path(inode))?;
        return Ok(ListxattrReply::Count(count(len)));
    }
    let mut names = buffer(size);
    let len = listxattr(path(inode), names.as_mut_slice())?;
    names.truncate(len);
    Ok(ListxattrReply::Names(names))
}

/// Removes a value.
///
/// # Errors
/// As removexattr(2).
pub fn remove(inode: &Inode, name: &CStr) -> io::Result<()> {
    check(name)?;
    Ok(removexattr(path(inode), name)?)
}
