//! Reading directories.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};

use super::handles::Handle;

/// Read from the host at a time, whatever the guest asks for.
const CHUNK: usize = 32 * 1024;

/// An entry as the host tells it.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// Its name.
    pub name: &'a CStr,
    /// Inode number on the host.
    pub number: u64,
    /// Where the next one is.
    pub next: u64,
    /// `DT_*`.
    pub kind: u32,
}

/// What to do after an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The entry was taken or skipped.
    More,
    /// The guest's buffer is full.
    Full,
}

/// Lists the directory from `offset`, without `.` and `..`, until `take` has enough.
///
/// # Errors
/// As getdents64(2), or of `take`, unless entries were taken before: those count, and the
/// error comes again with the next call.
pub fn list(
    handle: &Handle,
    offset: u64,
    mut take: impl FnMut(Listed<'_>) -> io::Result<Next>,
) -> io::Result<()> {
    let _position = handle
        .position
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    seek(handle.file(), SeekFrom::Start(offset))?;
    let mut chunk = [const { MaybeUninit::uninit() }; CHUNK];
    let mut entries = RawDir::new(handle.file(), &mut chunk);
    let mut taken = false;
    while let Some(entry) = entries.next() {
        let result = entry.map_err(io::Error::from).and_then(|entry| {
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Ok(Next::More);
            }
            take(Listed {
                name: entry.file_name(),
                number: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: kind(entry.file_type()),
            })
        });
        match result {
            Ok(Next::More) => taken = true,
            Ok(Next::Full) => return Ok(()),
            Err(_) if taken => return Ok(()),
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

fn kind(file_type: FileType) -> u32 {
    (match file_type {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    })
    .into()
}
