//! A raw file or block device that holds a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::SECTOR_BYTES;

/// How to open a backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackingOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the host's page cache (O_DIRECT). Requests whose buffers are not aligned to
    /// the device's blocks then fail with an I/O error; Linux guests align them.
    pub direct: bool,
}

/// Why something cannot hold a disk.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Not there, no permission, or O_DIRECT is not supported.
    #[error("cannot open disk {path}: {source}")]
    Open {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder, a pipe, a character device, ...
    #[error("disk {0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Another disk has the image, and one of the two writes.
    #[error("disk {0} is in use: an image has one user, or several that all read only")]
    InUse(PathBuf),
    /// Less than one sector.
    #[error("disk {path} has {bytes} bytes: at least one sector of {SECTOR_BYTES} is needed")]
    TooSmall {
        /// As given.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The size cannot be read.
    #[error("cannot read the size of disk {path}: {source}")]
    Size {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open disk. Its capacity is what it had when it was opened or last resized; a part
/// of a sector at the end of a file is not used.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
    file: File,
    block_device: bool,
    writable: bool,
    alignment: u32,
    sectors: AtomicU64,
}

impl Backing {
    /// Opens `path`.
    ///
    /// # Errors
    /// See [`BackingError`].
    pub fn open(path: impl AsRef<Path>, options: BackingOptions) -> Result<Self, BackingError> {
        let path = path.as_ref();
        let flags = if options.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            // A pipe must not block the open; refused below.
            .custom_flags(flags | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| BackingError::Open {
                path: path.to_owned(),
                source,
            })?;
        Self::new(path, file, options)
    }

    fn new(path: &Path, file: File, options: BackingOptions) -> Result<Self, BackingError> {
        let size_error = |source| BackingError::Size {
            path: path.to_owned(),
            source,
        };
        let kind = file.metadata().map_err(size_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BackingError::Kind(path.to_owned()));
        }
        let plain = rustix::fs::fcntl_getfl(&file).map_err(|err| size_error(err.into()))?
            - rustix::fs::OFlags::NONBLOCK;
        // io_uring would answer EAGAIN instead of waiting for the disk.
        rustix::fs::fcntl_setfl(&file, plain).map_err(|err| size_error(err.into()))?;
        let block_device = kind.is_block_device();
        let alignment = match (options.direct, block_device) {
            (false, _) => 1,
            (true, true) => ioctl::logical_block_size(file.as_fd()).map_err(size_error)?,
            (true, false) => direct_alignment(&file).map_err(size_error)?,
        };
        let backing = Self {
            path: path.to_owned(),
            file,
            block_device,
            writable: !options.read_only,
            alignment,
            sectors: AtomicU64::new(0),
        };
        let bytes = backing.measure().map_err(size_error)?;
        if bytes < SECTOR_BYTES {
            return Err(BackingError::TooSmall {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(backing)
    }

    /// Reads the size again; returns it in bytes, before rounding.
    pub(super) fn measure(&self) -> io::Result<u64> {
        let bytes = if self.block_device {
            ioctl::size(self.file.as_fd())?
        } else {
            self.file.metadata()?.len()
        };
        let unit = SECTOR_BYTES.max(u64::from(self.alignment));
        let rest = bytes.checked_rem(unit).unwrap_or(0);
        if rest != 0 {
            tracing::warn!(
                disk = %self.path.display(),
                "size {bytes} is not a multiple of {unit}: the last {rest} bytes are not used"
            );
        }
        let usable = bytes.saturating_sub(rest);
        self.sectors.store(usable / SECTOR_BYTES, Ordering::Release);
        Ok(bytes)
    }

    /// Capacity in sectors of [`SECTOR_BYTES`].
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// What offsets and lengths must be a multiple of, in bytes.
    #[must_use]
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// Locks an image, until it is closed, for one writer or any number of readers, here and in
    /// other processes that lock: two machines that write to one file system destroy it. Block
    /// devices are not locked, since others lock them for reasons of their own.
    ///
    /// # Errors
    /// [`BackingError::InUse`].
    pub fn lock(&self) -> Result<(), BackingError> {
        use rustix::fs::FlockOperation as Lock;
        if self.block_device {
            return Ok(());
        }
        let operation = if self.writable {
            Lock::NonBlockingLockExclusive
        } else {
            Lock::NonBlockingLockShared
        };
        match rustix::fs::flock(&self.file, operation) {
            Err(rustix::io::Errno::WOULDBLOCK) => Err(BackingError::InUse(self.path.clone())),
            // Or a file system without locks.
            _ => Ok(()),
        }
    }

    /// The smallest logical block size of a device that can have this backing.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.alignment.max(512).next_power_of_two()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Deallocates a range of a block device.
    pub(super) fn discard_blocks(&self, offset: u64, len: u64) -> io::Result<()> {
        ioctl::discard(self.file.as_fd(), offset, len)
    }
}

/// What direct I/O on a regular file needs; the usual page when the file system does not
/// say.
fn direct_alignment(file: &File) -> io::Result<u32> {
    const USUAL: u32 = 4096;
    let found = rustix::fs::statx(
        file,
        "",
        rustix::fs::AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::DIOALIGN,
    )?;
    let known = found.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0;
    let alignment = found.stx_dio_offset_align.max(found.stx_dio_mem_align);
    Ok(if known && alignment.is_power_of_two() {
        alignment
    } else {
        USUAL
    })
}

mod ioctl {
    //! The ioctls of block devices (linux/fs.h).

    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd};

    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);

    pub(super) fn size(fd: BorrowedFd<'_>) -> io::Result<u64> {
        let mut bytes = 0;
        // SAFETY: the kernel writes one u64 to `bytes`.
        unsafe { blkgetsize64(fd.as_raw_fd(), &raw mut bytes) }?;
        Ok(bytes)
    }

    pub(super) fn logical_block_size(fd: BorrowedFd<'_>) -> io::Result<u32> {
        let mut bytes = 0;
        // SAFETY: the kernel writes one int to `bytes`.
        unsafe { blksszget(fd.as_raw_fd(), &raw mut bytes) }?;
        u32::try_from(bytes).map_err(io::Error::other)
    }

    pub(super) fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: the kernel reads two u64 from `range`.
        unsafe { blkdiscard(fd.as_raw_fd(), &raw const range) }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_sizes_are_rounded_down() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * 512 + 511).unwrap();
        let backing = Backing::open(file.path(), BackingOptions::default()).unwrap();
        assert_eq!(backing.sectors(), 3);
        file.as_file().set_len(5 * 512).unwrap();
        assert_eq!(backing.sectors(), 3);
        assert_eq!(backing.measure().unwrap(), 5 * 512);
        assert_eq!(backing.sectors(), 5);
    }

    #[test]
    fn an_image_has_one_writer_or_several_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let open = |read_only| {
            let options = BackingOptions {
                read_only,
                ..BackingOptions::default()
            };
            let backing = Backing::open(file.path(), options)?;
            backing.lock().map(|()| backing)
        };
        let readers = [open(true).unwrap(), open(true).unwrap()];
        let err = open(false).unwrap_err();
        assert!(matches!(err, BackingError::InUse(_)), "{err}");
        drop(readers);
        let writer = open(false).unwrap();
        open(true).unwrap_err();
        open(false).unwrap_err();
        drop(writer);
        open(false).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path, read_only| {
            let options = BackingOptions {
                read_only,
                ..BackingOptions::default()
            };
            Backing::open(path, options)
        };
        let missing = open(&dir.path().join("missing"), false).unwrap_err();
        assert!(matches!(missing, BackingError::Open { .. }), "{missing}");
        let folder = open(dir.path(), true).unwrap_err();
        assert!(matches!(folder, BackingError::Kind(_)), "{folder}");
        let device = open(Path::new("/dev/null"), false).unwrap_err();
        assert!(matches!(device, BackingError::Kind(_)), "{device}");
        let small = dir.path().join("small");
        std::fs::write(&small, [0; 511]).unwrap();
        let small = open(&small, false).unwrap_err();
        assert!(small.to_string().contains("511 bytes"), "{small}");
    }

    #[test]
    fn direct_io_has_an_alignment() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let options = BackingOptions {
            direct: true,
            ..BackingOptions::default()
        };
        match Backing::open(file.path(), options) {
            Ok(backing) => assert!(backing.alignment() >= 512),
            Err(err) => println!("skipped: no direct I/O here: {err}"),
        }
    }
}
