//! A directory tree of the host as a guest sees it, and the steps that operations share.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, FUSE_ATTR_DAX, stat64};
use fuse_backend_rs::api::filesystem::{Context, Entry, OpenOptions, ROOT_ID};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx};

use super::attributes::{self, Devices};
use super::config::{CachePolicy, FsConfig};
use super::handles::Handles;
use super::identity::{Acting, ClearsSetId};
use super::inodes::{Inode, Inodes, stat};
use super::names::{component, errno};
use super::window::Window;

/// Of the flags a guest opens with, those that mean something for the host's descriptor.
/// O_DIRECT is not among them: it would pass the host's alignment rules on to the guest.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC);
/// For names: refer to the file, whatever it is, and to nothing behind it.
pub(super) const PATH_FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Options of [`FsConfig`] that operations depend on.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub cache: CachePolicy,
    pub read_only: bool,
    pub writeback: bool,
    pub xattr: bool,
    pub device_nodes: bool,
    pub dax_bytes: u64,
    pub max_inodes: usize,
    pub max_handles: usize,
}

impl From<&FsConfig> for Policy {
    fn from(config: &FsConfig) -> Self {
        Self {
            cache: config.cache,
            read_only: config.read_only,
            writeback: config.writeback,
            xattr: config.xattr,
            device_nodes: config.device_nodes,
            dax_bytes: config.dax_bytes,
            max_inodes: config.max_inodes,
            max_handles: config.max_handles,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Share {
    pub(super) policy: Policy,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) devices: Devices,
    /// `/proc/self/fd`: where `O_PATH` descriptors become open files.
    pub(super) proc_fds: OwnedFd,
    pub(super) window: Option<Arc<Window>>,
    /// The guest collects writes: it agreed to [`FsConfig::writeback`].
    pub(super) writeback: AtomicBool,
}

impl Share {
    /// Shares `root`, its files also through `window`.
    ///
    /// # Errors
    /// When `/proc` is not mounted, or the root cannot be examined.
    pub fn new(root: OwnedFd, policy: Policy, window: Option<Arc<Window>>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let share = Self {
            policy,
            inodes: Inodes::new(root, policy.max_inodes)?,
            handles: Handles::new(policy.max_handles),
            devices: Devices::default(),
            proc_fds: rustix::fs::open("/proc/self/fd", flags, Mode::empty())?,
            window,
            writeback: AtomicBool::new(false),
        };
        share.number_devices()?;
        Ok(share)
    }

    /// Shares `root` from now on.
    ///
    /// # Errors
    /// EBUSY when the guest knows files of the tree shared until now; as statx(2).
    pub fn move_to(&self, root: OwnedFd) -> io::Result<()> {
        self.inodes.replace_root(root)?;
        self.devices.clear();
        self.number_devices()
    }

    /// The root's device is the one whose inode numbers stay as they are.
    fn number_devices(&self) -> io::Result<()> {
        let root = self.inodes.get(ROOT_ID)?;
        self.devices.number(&root.stat()?, 0);
        Ok(())
    }

    pub(super) fn check_writable(&self) -> io::Result<()> {
        if self.policy.read_only {
            return Err(errno(libc::EROFS));
        }
        Ok(())
    }

    pub(super) fn attr(&self, stat: &Statx) -> stat64 {
        attributes::attributes(stat, self.devices.number(stat, stat.stx_ino))
    }

    /// The guest learns of the file behind `fd`.
    pub(super) fn entry(&self, fd: OwnedFd) -> io::Result<Entry> {
        let stat = stat(fd.as_fd())?;
        let timeout = self.policy.cache.timeout();
        let inode = self.inodes.learn(fd, &stat)?;
        let direct = self.is_direct(inode);
        Ok(Entry {
            inode,
            generation: 0,
            attr: self.attr(&stat),
            attr_flags: if direct { FUSE_ATTR_DAX } else { 0 },
            attr_timeout: timeout,
            entry_timeout: timeout,
        })
    }

    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        self.entry(rustix::fs::openat(parent, name, PATH_FLAGS, Mode::empty())?)
    }

    /// Opens what `inode` refers to.
    pub(super) fn reopen(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        inode.check_openable()?;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::openat(&self.proc_fds, inode.proc_name(), flags, Mode::empty())?;
        Ok(File::from(fd))
    }

    /// The host's open flags for those of the guest.
    pub(super) fn open_flags(&self, guest: u32) -> io::Result<OFlags> {
        let mut flags = OFlags::from_bits_retain(guest) & OPEN_FLAGS;
        let reads = flags & OFlags::ACCMODE == OFlags::RDONLY;
        if !reads || flags.contains(OFlags::TRUNC) {
            self.check_writable()?;
        }
        if self.writeback.load(Ordering::Relaxed) {
            // The guest reads pages it is going to write in part, and knows where the end
            // of the file is.
            if flags & OFlags::ACCMODE == OFlags::WRONLY {
                flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
            }
            flags -= OFlags::APPEND;
        }
        Ok(flags)
    }

    pub(super) fn open_options(&self) -> OpenOptions {
        match self.policy.cache {
            CachePolicy::Never => OpenOptions::DIRECT_IO,
            // The guest drops pages by itself when the file's time or size has changed.
            CachePolicy::Auto | CachePolicy::Always => OpenOptions::KEEP_CACHE,
        }
    }

    /// Opens or creates `name` and returns it with its entry.
    pub(super) fn create_or_open(
        &self,
        context: &Context,
        parent: &Inode,
        name: &CStr,
        args: &CreateIn,
    ) -> io::Result<(Entry, File)> {
        let flags = self.open_flags(args.flags)?;
        let mode = Mode::from_raw_mode(args.mode & !(args.umask & 0o777) & 0o7777);
        let created = {
            let _acting = Acting::user(context)?;
            let flags = flags
                | OFlags::CREATE
                | OFlags::EXCL
                | OFlags::NOFOLLOW
                | OFlags::CLOEXEC
                | OFlags::NOCTTY;
            rustix::fs::openat(parent, name, flags, mode)
        };
        match created {
            Ok(fd) => {
                // By descriptor, not by name: the name may already mean another file.
                let number = fd.as_raw_fd().to_string();
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let path = rustix::fs::openat(&self.proc_fds, number, flags, Mode::empty())?;
                Ok((self.entry(path)?, File::from(fd)))
            }
            Err(rustix::io::Errno::EXIST)
                if !OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL) =>
            {
                let entry = self.find(parent, name)?;
                let clears = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                let file = self.inodes.get(entry.inode).and_then(|inode| {
                    let _clears = ClearsSetId::when(clears)?;
                    self.reopen(&inode, flags)
                });
                match file {
                    Ok(file) => Ok((entry, file)),
                    Err(err) => {
                        self.inodes.forget(entry.inode, 1);
                        Err(err)
                    }
                }
            }
            Err(err) => Err(err.into()),
        }
    }

    pub(super) fn check_node(&self, mode: u32, rdev: u32) -> io::Result<FileType> {
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => Ok(kind),
            // A whiteout of overlayfs.
            FileType::CharacterDevice if rdev == 0 => Ok(kind),
            FileType::CharacterDevice | FileType::BlockDevice if self.policy.device_nodes => {
                Ok(kind)
            }
            FileType::CharacterDevice | FileType::BlockDevice => Err(errno(libc::EPERM)),
            _ => Err(errno(libc::EINVAL)),
        }
    }

    /// A change of size; the handle's own file if it has one.
    pub(super) fn truncate(
        &self,
        id: u64,
        inode: &Inode,
        handle: Option<u64>,
        size: u64,
        clears: bool,
    ) -> io::Result<()> {
        let _clears = ClearsSetId::when(clears)?;
        match handle {
            Some(handle) => {
                let handle = self.handles.get(handle, id)?;
                Ok(rustix::fs::ftruncate(handle.file(), size)?)
            }
            None => {
                let file = self.reopen(inode, OFlags::WRONLY)?;
                Ok(rustix::fs::ftruncate(&file, size)?)
            }
        }
    }

    pub(super) fn unlink_entry(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        Ok(rustix::fs::unlinkat(&*parent, component(name)?, flags)?)
    }

    pub(super) fn sync(&self, inode: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        if data_only {
            handle.file().sync_data()
        } else {
            handle.file().sync_all()
        }
    }

    pub(super) fn with_xattr(&self, inode: u64) -> io::Result<Arc<Inode>> {
        if !self.policy.xattr {
            return Err(errno(libc::ENOSYS));
        }
        self.inodes.get(inode)
    }
}
