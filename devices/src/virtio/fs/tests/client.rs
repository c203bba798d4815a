//! Plays the guest's virtio-fs driver: one request at a time, on one queue.

use std::path::Path;

use crate::testing::{Buffer, DeviceDriver, Used};
use crate::virtio::fs::{Fs, FsConfig};

pub const HIPRIO: usize = 0;
pub const REQUEST: usize = 1;
pub const ROOT: u64 = 1;

/// Operation codes of the FUSE protocol.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
}

/// Little-endian fields in a row.
#[derive(Default)]
pub struct Fields(pub Vec<u8>);

impl Fields {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A string with its NUL.
    pub fn name(mut self, name: &str) -> Self {
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

pub fn fields() -> Fields {
    Fields::default()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The parts of an entry reply that tests look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub ino: u64,
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Entry {
    pub const LEN: usize = 40 + Attr::LEN;

    pub fn parse(bytes: &[u8]) -> Self {
        let attr = Attr::parse(&bytes[40..]);
        Self {
            node: u64_at(bytes, 0),
            ino: attr.ino,
            size: attr.size,
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
        }
    }
}

/// `struct fuse_attr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Attr {
    pub const LEN: usize = 88;

    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            ino: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            mtime: u64_at(bytes, 32),
            mode: u32_at(bytes, 60),
            uid: u32_at(bytes, 68),
            gid: u32_at(bytes, 72),
        }
    }
}

/// A guest with a mounted share.
pub struct Client {
    pub driver: DeviceDriver<Fs>,
    pub uid: u32,
    pub gid: u32,
    unique: u64,
}

impl Client {
    /// A share of `root` with the defaults, mounted.
    pub fn new(root: &Path) -> Self {
        Self::with(FsConfig::new("share", root.to_owned()))
    }

    pub fn with(config: FsConfig) -> Self {
        let mut client = Self::unmounted(config);
        client.init();
        client
    }

    pub fn unmounted(config: FsConfig) -> Self {
        let mut driver = DeviceDriver::new(Fs::new(config).unwrap());
        driver.activate().unwrap();
        Self {
            driver,
            uid: 0,
            gid: 0,
            unique: 0,
        }
    }

    pub fn init(&mut self) -> Vec<u8> {
        // 7.36, everything that fits 32 bits offered.
        let body = fields().u32(7).u32(36).u32(0x20000).u32(!(1 << 30));
        self.call(op::INIT, 0, body, 64).unwrap()
    }

    pub fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let len = u32::try_from(40 + body.len()).unwrap();
        fields()
            .u32(len)
            .u32(opcode)
            .u64(self.unique)
            .u64(node)
            .u32(self.uid)
            .u32(self.gid)
            .u32(1)
            .u32(0)
            .bytes(body)
            .0
    }

    /// Sends buffers as one request and waits for its end.
    pub fn send(&mut self, buffers: &[Buffer]) -> Used {
        self.driver.request(REQUEST, buffers)
    }

    /// A request with a reply of at most `room` bytes; the error number if it failed.
    pub fn call(
        &mut self,
        opcode: u32,
        node: u64,
        body: Fields,
        room: usize,
    ) -> Result<Vec<u8>, i32> {
        let Fields(body) = body;
        let request = self.request(opcode, node, &body);
        let used = self.send(&[
            Buffer::Readable(request),
            Buffer::Writable(u32::try_from(16 + room).unwrap()),
        ]);
        self.reply(&used)
    }

    pub fn reply(&self, used: &Used) -> Result<Vec<u8>, i32> {
        let data = &used.data;
        assert!(data.len() >= 16, "no reply: {used:?}");
        assert_eq!(u32_at(data, 0), used.len, "length in the reply's header");
        assert_eq!(u64_at(data, 8), self.unique);
        match u32_at(data, 4).cast_signed() {
            0 => Ok(data[16..].to_vec()),
            error => Err(-error),
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(op::LOOKUP, parent, fields().name(name), Entry::LEN)
            .map(|reply| Entry::parse(&reply))
    }

    /// No reply: goes to the high-priority queue.
    pub fn forget(&mut self, node: u64, count: u64) {
        let request = self.request(op::FORGET, node, &count.to_le_bytes());
        let used = self.driver.request(HIPRIO, &[Buffer::Readable(request)]);
        assert_eq!(used.len, 0);
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        self.call(op::GETATTR, node, fields().u64(0).u64(0), 16 + Attr::LEN)
            .map(|reply| Attr::parse(&reply[16..]))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = fields().u32(flags.cast_unsigned()).u32(0);
        self.call(op::OPEN, node, body, 16)
            .map(|reply| u64_at(&reply, 0))
    }

    pub fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        self.call(op::OPENDIR, node, fields().u32(0).u32(0), 16)
            .map(|reply| u64_at(&reply, 0))
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(Entry, u64), i32> {
        let body = fields()
            .u32(flags.cast_unsigned())
            .u32(mode)
            .u32(0)
            .u32(0)
            .name(name);
        self.call(op::CREATE, parent, body, Entry::LEN + 16)
            .map(|reply| (Entry::parse(&reply), u64_at(&reply, Entry::LEN)))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        let body = fields().u32(0o755).u32(0).name(name);
        self.call(op::MKDIR, parent, body, Entry::LEN)
            .map(|reply| Entry::parse(&reply))
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry, i32> {
        let body = fields().name(name).name(target);
        self.call(op::SYMLINK, parent, body, Entry::LEN)
            .map(|reply| Entry::parse(&reply))
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<Entry, i32> {
        let body = fields().u32(mode).u32(rdev).u32(0).u32(0).name(name);
        self.call(op::MKNOD, parent, body, Entry::LEN)
            .map(|reply| Entry::parse(&reply))
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let body = fields()
            .u64(fh)
            .u64(offset)
            .u32(u32::try_from(data.len()).unwrap())
            .u32(0)
            .u64(0)
            .u32(0)
            .u32(0)
            .bytes(data);
        self.call(op::WRITE, node, body, 8)
            .map(|reply| u32_at(&reply, 0))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = fields()
            .u64(fh)
            .u64(offset)
            .u32(size)
            .u32(0)
            .u64(0)
            .u32(0)
            .u32(0);
        self.call(op::READ, node, body, size as usize)
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Result<(), i32> {
        let body = fields().u64(fh).u32(0).u32(0).u64(0);
        self.call(op::RELEASE, node, body, 0).map(drop)
    }

    /// Names, inode numbers and kinds of a directory, read in steps of `size` bytes.
    pub fn readdir(&mut self, node: u64, size: u32) -> Vec<(String, u64, u32)> {
        let fh = self.opendir(node).unwrap();
        let mut listed = Vec::new();
        let mut offset = 0;
        loop {
            let body = fields()
                .u64(fh)
                .u64(offset)
                .u32(size)
                .u32(0)
                .u64(0)
                .u32(0)
                .u32(0);
            let reply = self.call(op::READDIR, node, body, size as usize).unwrap();
            if reply.is_empty() {
                let body = fields().u64(fh).u32(0).u32(0).u64(0);
                self.call(op::RELEASEDIR, node, body, 0).unwrap();
                return listed;
            }
            let mut rest = reply.as_slice();
            while !rest.is_empty() {
                let len = u32_at(rest, 16) as usize;
                let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
                listed.push((name, u64_at(rest, 0), u32_at(rest, 20)));
                offset = u64_at(rest, 8);
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
    }

    /// SETATTR with the fields of `valid` set from `size`, `mode`, `mtime`.
    pub fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        mtime: u64,
    ) -> Result<Attr, i32> {
        let body = fields()
            .u32(valid)
            .u32(0)
            .u64(0)
            .u64(size)
            .u64(0)
            .u64(0)
            .u64(mtime)
            .u64(0)
            .u32(0)
            .u32(0)
            .u32(0)
            .u32(mode)
            .u32(0)
            .u32(self.uid)
            .u32(self.gid)
            .u32(0);
        self.call(op::SETATTR, node, body, 16 + Attr::LEN)
            .map(|reply| Attr::parse(&reply[16..]))
    }
}
