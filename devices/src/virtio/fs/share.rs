//! The operations of FUSE on a directory tree of the host.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Statx};
use rustix::process::{Gid, Uid};

use super::attributes::{self, Devices};
use super::config::{CachePolicy, FsConfig};
use super::handles::Handles;
use super::identity::{Acting, ClearsSetId};
use super::inodes::{Inode, Inodes, stat};
use super::listing::{self, Next};
use super::names::{component, errno};
use super::xattr;

/// Of the flags a guest opens with, those that mean something for the host's descriptor.
/// O_DIRECT is not among them: it would pass the host's alignment rules on to the guest.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC);
/// For names: refer to the file, whatever it is, and to nothing behind it.
const PATH_FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Options of [`FsConfig`] that operations depend on.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    cache: CachePolicy,
    read_only: bool,
    writeback: bool,
    xattr: bool,
    device_nodes: bool,
}

/// A directory tree as a guest sees it.
#[derive(Debug)]
pub struct Share {
    policy: Policy,
    inodes: Inodes,
    handles: Handles,
    devices: Devices,
    /// `/proc/self/fd`: where `O_PATH` descriptors become open files.
    proc_fds: OwnedFd,
    /// The guest collects writes: it agreed to [`FsConfig::writeback`].
    writeback: AtomicBool,
}

type Opened = (Option<u64>, OpenOptions, Option<u32>);

impl Share {
    /// Shares `root`.
    ///
    /// # Errors
    /// When `/proc` is not mounted, or the root cannot be examined.
    pub fn new(root: OwnedFd, config: &FsConfig) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let share = Self {
            policy: Policy {
                cache: config.cache,
                read_only: config.read_only,
                writeback: config.writeback,
                xattr: config.xattr,
                device_nodes: config.device_nodes,
            },
            inodes: Inodes::new(root, config.max_inodes)?,
            handles: Handles::new(config.max_handles),
            devices: Devices::default(),
            proc_fds: rustix::fs::open("/proc/self/fd", flags, Mode::empty())?,
            writeback: AtomicBool::new(false),
        };
        // The root's device is the one whose inode numbers stay as they are.
        let root = share
            .inodes
            .get(fuse_backend_rs::api::filesystem::ROOT_ID)?;
        share.devices.number(&root.stat()?, 0);
        Ok(share)
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.policy.read_only {
            return Err(errno(libc::EROFS));
        }
        Ok(())
    }

    fn attr(&self, stat: &Statx) -> stat64 {
        attributes::attributes(stat, self.devices.number(stat, stat.stx_ino))
    }

    /// The guest learns of the file behind `fd`.
    fn entry(&self, fd: OwnedFd) -> io::Result<Entry> {
        let stat = stat(fd.as_fd())?;
        let timeout = self.policy.cache.timeout();
        Ok(Entry {
            inode: self.inodes.learn(fd, &stat)?,
            generation: 0,
            attr: self.attr(&stat),
            attr_flags: 0,
            attr_timeout: timeout,
            entry_timeout: timeout,
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        self.entry(rustix::fs::openat(parent, name, PATH_FLAGS, Mode::empty())?)
    }

    /// Opens what `inode` refers to.
    fn reopen(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        inode.check_openable()?;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::openat(&self.proc_fds, inode.proc_name(), flags, Mode::empty())?;
        Ok(File::from(fd))
    }

    /// The host's open flags for those of the guest.
    fn open_flags(&self, guest: u32) -> io::Result<OFlags> {
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

    fn open_options(&self) -> OpenOptions {
        match self.policy.cache {
            CachePolicy::Never => OpenOptions::DIRECT_IO,
            // The guest drops pages by itself when the file's time or size has changed.
            CachePolicy::Auto | CachePolicy::Always => OpenOptions::KEEP_CACHE,
        }
    }

    /// Opens or creates `name` and returns it with its entry.
    fn create_or_open(
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

    fn check_node(&self, mode: u32, rdev: u32) -> io::Result<FileType> {
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
    fn truncate(
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

    fn unlink_entry(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        Ok(rustix::fs::unlinkat(&*parent, component(name)?, flags)?)
    }

    fn sync(&self, inode: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        if data_only {
            handle.file().sync_data()
        } else {
            handle.file().sync_all()
        }
    }

    fn with_xattr(&self, inode: u64) -> io::Result<Arc<Inode>> {
        if !self.policy.xattr {
            return Err(errno(libc::ENOSYS));
        }
        self.inodes.get(inode)
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::BIG_WRITES
            | FsOptions::DO_READDIRPLUS
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::INIT_EXT
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::READDIRPLUS_AUTO;
        if self.policy.cache != CachePolicy::Never {
            // A symlink's target never changes: another target is another inode.
            wanted |= FsOptions::CACHE_SYMLINKS;
            if self.policy.writeback && !self.policy.read_only {
                wanted |= FsOptions::WRITEBACK_CACHE;
            }
        }
        let writeback = (wanted & capable).contains(FsOptions::WRITEBACK_CACHE);
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&*self.inodes.get(parent)?, component(name)?)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let stat = self.inodes.get(inode)?.stat()?;
        Ok((self.attr(&stat), self.policy.cache.timeout()))
    }

    fn setattr(
        &self,
        context: &Context,
        id: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.check_writable()?;
        let inode = self.inodes.get(id)?;
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(attr.st_mode & 0o7777);
            let link = inode.proc_name();
            rustix::fs::chmodat(&self.proc_fds, link, mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then_some(attr.st_uid);
            let gid = valid.contains(SetattrValid::GID).then_some(attr.st_gid);
            if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
                return Err(errno(libc::EINVAL));
            }
            rustix::fs::chownat(
                &*inode,
                c"",
                uid.map(Uid::from_raw),
                gid.map(Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| errno(libc::EINVAL))?;
            let clears = valid.contains(SetattrValid::KILL_SUIDGID);
            self.truncate(id, &inode, handle, size, clears)?;
        }
        if let Some(times) = attributes::times(&attr, valid)? {
            let link = inode.proc_name();
            rustix::fs::utimensat(&self.proc_fds, link, &times, AtFlags::empty())?;
        }
        self.getattr(context, id, handle)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(inode)?;
        Ok(rustix::fs::readlinkat(&*inode, c"", Vec::new())?.into_bytes())
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let name = component(name)?;
        let parent = self.inodes.get(parent)?;
        {
            let _acting = Acting::user(context)?;
            rustix::fs::symlinkat(target, &*parent, name)?;
        }
        self.find(&parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let name = component(name)?;
        let kind = self.check_node(mode, rdev)?;
        let parent = self.inodes.get(parent)?;
        let mode = Mode::from_raw_mode(mode & !umask & 0o7777);
        let node = |mode| rustix::fs::mknodat(&*parent, name, kind, mode, rdev.into());
        if rdev == 0 || !matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
            let _acting = Acting::user(context)?;
            node(mode)?;
        } else {
            // Takes a privilege that the guest's user does not have here: made by root
            // without access for anybody, then given away, by descriptor because the name
            // may mean another file by then.
            node(Mode::empty())?;
            let fd = rustix::fs::openat(&*parent, name, PATH_FLAGS, Mode::empty())?;
            let (uid, gid) = (Uid::from_raw(context.uid), Gid::from_raw(context.gid));
            rustix::fs::chownat(&fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            let link = fd.as_raw_fd().to_string();
            rustix::fs::chmodat(&self.proc_fds, link, mode, AtFlags::empty())?;
        }
        self.find(&parent, name)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let name = component(name)?;
        let parent = self.inodes.get(parent)?;
        {
            let _acting = Acting::user(context)?;
            let mode = Mode::from_raw_mode(mode & !umask & 0o7777);
            rustix::fs::mkdirat(&*parent, name, mode)?;
        }
        self.find(&parent, name)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.unlink_entry(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.unlink_entry(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.check_writable()?;
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
        let (old, new) = (self.inodes.get(olddir)?, self.inodes.get(newdir)?);
        let (oldname, newname) = (component(oldname)?, component(newname)?);
        Ok(rustix::fs::renameat_with(
            &*old, oldname, &*new, newname, flags,
        )?)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.check_writable()?;
        let name = component(name)?;
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(parent)?);
        let link = inode.proc_name();
        rustix::fs::linkat(
            &self.proc_fds,
            link,
            &*parent,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.find(&parent, name)
    }

    fn open(&self, _: &Context, inode: u64, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        let flags = self.open_flags(flags)?;
        let file = {
            let _clears = ClearsSetId::when(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
            self.reopen(&*self.inodes.get(inode)?, flags)?
        };
        let handle = self.handles.add(inode, file)?;
        Ok((Some(handle), self.open_options(), None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let (entry, file) = self.create_or_open(context, &parent, component(name)?, &args)?;
        match self.handles.add(entry.inode, file) {
            Ok(handle) => Ok((entry, Some(handle), self.open_options(), None)),
            Err(err) => {
                self.inodes.forget(entry.inode, 1);
                Err(err)
            }
        }
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let size = usize::try_from(size).map_err(|_| errno(libc::EINVAL))?;
        handle.with_file(|file| w.write_from(file, size, offset))
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.check_writable()?;
        let handle = self.handles.get(handle, inode)?;
        let size = usize::try_from(size).map_err(|_| errno(libc::EINVAL))?;
        let _clears = ClearsSetId::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        handle.with_file(|file| r.read_to(file, size, offset))
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, _: u64) -> io::Result<()> {
        // Closing a copy reports what network file systems report on close.
        self.handles
            .get(handle, inode)?
            .file()
            .try_clone()
            .map(drop)
    }

    fn fsync(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.sync(inode, handle, datasync)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.check_writable()?;
        let handle = self.handles.get(handle, inode)?;
        let mode = FallocateFlags::from_bits(mode).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        Ok(rustix::fs::fallocate(handle.file(), mode, offset, length)?)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        let host = rustix::fs::fstatvfs(&*self.inodes.get(inode)?)?;
        // The default is zeroed but for what is set below.
        let mut fs = NoFileSystem.statfs(&Context::default(), 0)?;
        fs.f_bsize = host.f_bsize;
        fs.f_frsize = host.f_frsize;
        fs.f_blocks = host.f_blocks;
        fs.f_bfree = host.f_bfree;
        fs.f_bavail = host.f_bavail;
        fs.f_files = host.f_files;
        fs.f_ffree = host.f_ffree;
        fs.f_favail = host.f_favail;
        fs.f_namemax = host.f_namemax;
        Ok(fs)
    }

    fn setxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let inode = self.with_xattr(inode)?;
        self.check_writable()?;
        xattr::set(&inode, name, value, flags)
    }

    fn getxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        xattr::get(&*self.with_xattr(inode)?, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        xattr::list(&*self.with_xattr(inode)?, size)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.with_xattr(inode)?;
        self.check_writable()?;
        xattr::remove(&inode, name)
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let file = self.reopen(
            &*self.inodes.get(inode)?,
            OFlags::RDONLY | OFlags::DIRECTORY,
        )?;
        let handle = self.handles.add(inode, file)?;
        let options = match self.policy.cache {
            CachePolicy::Always => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            CachePolicy::Auto | CachePolicy::Never => OpenOptions::empty(),
        };
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let directory = stat(handle.file().as_fd())?;
        listing::list(&handle, offset, |listed| {
            let added = add_entry(DirEntry {
                ino: self.devices.number(&directory, listed.number),
                offset: listed.next,
                type_: listed.kind,
                name: listed.name.to_bytes(),
            })?;
            Ok(if added == 0 { Next::Full } else { Next::More })
        })
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let directory = self.inodes.get(inode)?;
        listing::list(&handle, offset, |listed| {
            let entry = match self.find(&directory, listed.name) {
                Ok(entry) => entry,
                // Gone since the host listed it.
                Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Next::More),
                Err(err) => return Err(err),
            };
            let added = add_entry(
                DirEntry {
                    ino: entry.attr.st_ino,
                    offset: listed.next,
                    type_: listed.kind,
                    name: listed.name.to_bytes(),
                },
                entry,
            );
            match added {
                Ok(0) | Err(_) => {
                    // The guest does not get to know of it.
                    self.inodes.forget(entry.inode, 1);
                    added.map(|_| Next::Full)
                }
                Ok(_) => Ok(Next::More),
            }
        })
    }

    fn fsyncdir(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.sync(inode, handle, datasync)
    }

    fn releasedir(&self, _: &Context, inode: u64, _: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn lseek(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        // The guest asks the host for these two only.
        let to = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        let handle = self.handles.get(handle, inode)?;
        Ok(rustix::fs::seek(handle.file(), to)?)
    }
}

/// For the defaults of the trait.
struct NoFileSystem;

impl FileSystem for NoFileSystem {
    type Inode = u64;
    type Handle = u64;
}
