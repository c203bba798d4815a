//! What each request does to the share.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::process::{Gid, Uid};

use super::attributes;
use super::config::CachePolicy;
use super::identity::{Acting, ClearsSetId};
use super::inodes::stat;
use super::listing::{self, Next};
use super::names::{component, errno};
use super::share::{PATH_FLAGS, Share};
use super::xattr;

type Opened = (Option<u64>, OpenOptions, Option<u32>);

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
        if self.window.is_some() {
            wanted |= FsOptions::MAP_ALIGNMENT | FsOptions::PERFILE_DAX;
        }
        let writeback = (wanted & capable).contains(FsOptions::WRITEBACK_CACHE);
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.handles.clear();
        self.inodes.clear();
        if let Some(window) = &self.window {
            window.clear();
        }
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
