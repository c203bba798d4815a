//! FUSE requests of every kind, with any fields, on a share that must not be left.
#![no_main]

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use devices::virtio::VirtioDevice;
use devices::virtio::fs::{DAX_BLOCK_BYTES, Fs, FsConfig};
use fuzz::{
    Buffer, RawDescriptor, Result, Subject, TestGuest, Unstructured, confined, fresh_dir, run,
};
use libfuzzer_sys::fuzz_target;

/// Names worth trying; requests carry one or two of them.
const NAMES: [&[u8]; 12] = [
    b"file",
    b"folder",
    b"link",
    b"new",
    b"other",
    b"",
    b".",
    b"..",
    b"../canary",
    b"folder/inner",
    b"/canary/file",
    b"user.name",
];

/// Operations with the size of their fixed part and the number of names after it.
const OPERATIONS: [(u32, usize, usize); 44] = [
    (1, 0, 1),   // LOOKUP
    (2, 8, 0),   // FORGET
    (3, 16, 0),  // GETATTR
    (4, 88, 0),  // SETATTR
    (5, 0, 0),   // READLINK
    (6, 0, 2),   // SYMLINK
    (8, 16, 1),  // MKNOD
    (9, 8, 1),   // MKDIR
    (10, 0, 1),  // UNLINK
    (11, 0, 1),  // RMDIR
    (12, 8, 2),  // RENAME
    (13, 8, 1),  // LINK
    (14, 8, 0),  // OPEN
    (15, 40, 0), // READ
    (16, 40, 1), // WRITE
    (17, 0, 0),  // STATFS
    (18, 24, 0), // RELEASE
    (20, 16, 0), // FSYNC
    (21, 8, 2),  // SETXATTR
    (22, 8, 1),  // GETXATTR
    (23, 8, 0),  // LISTXATTR
    (24, 0, 1),  // REMOVEXATTR
    (25, 24, 0), // FLUSH
    (26, 64, 0), // INIT
    (27, 8, 0),  // OPENDIR
    (28, 40, 0), // READDIR
    (29, 24, 0), // RELEASEDIR
    (30, 16, 0), // FSYNCDIR
    (31, 48, 0), // GETLK
    (32, 48, 0), // SETLK
    (34, 8, 0),  // ACCESS
    (35, 16, 1), // CREATE
    (36, 8, 0),  // INTERRUPT
    (38, 0, 0),  // DESTROY
    (39, 32, 0), // IOCTL
    (42, 8, 1),  // BATCH_FORGET
    (43, 32, 0), // FALLOCATE
    (44, 40, 0), // READDIRPLUS
    (45, 16, 2), // RENAME2
    (46, 24, 0), // LSEEK
    (47, 56, 0), // COPY_FILE_RANGE
    (48, 40, 0), // SETUPMAPPING
    (49, 20, 0), // REMOVEMAPPING of one part
    (49, 36, 0), // of two
];

const HIPRIO: usize = 0;

/// Where the guest has the window onto files.
const WINDOW: u64 = 1 << 32;

struct Requests {
    share: PathBuf,
    begun: bool,
}

impl Subject for Requests {
    type Device = Fs;

    fn device(&mut self, _: &TestGuest) -> Fs {
        let config = FsConfig {
            workers: 1,
            max_inodes: 64,
            max_handles: 64,
            dax_bytes: 4 * DAX_BLOCK_BYTES,
            ..FsConfig::new("share", self.share.clone())
        };
        let device = Fs::new(config).unwrap();
        device.shared_memory().unwrap().place(WINDOW).unwrap();
        device
    }

    fn chain(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if queue != HIPRIO && !std::mem::replace(&mut self.begun, true) {
            // INIT of version 7.31, without which nothing is served.
            let mut body = vec![0; 64];
            body[0] = 7;
            body[4] = 31;
            return Ok(request(26, 0, &body, 80));
        }
        let (opcode, fixed, names) = *input.choose(&OPERATIONS)?;
        let mut body = Vec::with_capacity(fixed + 32);
        while body.len() < fixed {
            // Numbers are small, mostly: node ids, handles, flags and sizes.
            let number: u64 = match input.int_in_range(0..=8)? {
                0..=3 => input.int_in_range(0..=8)?,
                4 => input.int_in_range(0..=0x2_0000)?,
                5 => u64::from(input.arbitrary::<u32>()?) << 32 | 0o600,
                6 => input.int_in_range(0..=5)? * DAX_BLOCK_BYTES,
                _ => input.arbitrary()?,
            };
            body.extend(number.to_le_bytes());
        }
        body.truncate(fixed);
        for _ in 0..names {
            body.extend(*input.choose(&NAMES)?);
            body.push(0);
        }
        if input.ratio(1, 16)? {
            let len = input.int_in_range(0..=body.len())?;
            body.truncate(len);
        }
        let node = input.int_in_range(0..=6)?;
        let mut buffers = request(opcode, node, &body, input.int_in_range(0..=0x2000)?);
        if input.ratio(1, 16)? {
            // Data in the window, where a file is mapped or nothing.
            buffers.push(Buffer::Raw(RawDescriptor {
                addr: WINDOW + input.int_in_range(0..=4)? * DAX_BLOCK_BYTES,
                len: input.int_in_range(0..=0x2000)?,
                flags: 2,
                next: 0,
            }));
        }
        Ok(buffers)
    }

    fn patience(&self) -> u16 {
        10
    }
}

/// A request with its header, and room for the answer.
fn request(opcode: u32, node: u64, body: &[u8], room: u32) -> Vec<Buffer> {
    let len = u32::try_from(40 + body.len()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(40 + body.len());
    bytes.extend(len.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // uid, gid, pid, padding: root.
    bytes.extend([0; 16]);
    bytes.extend(body);
    vec![Buffer::Readable(bytes), Buffer::Writable(room)]
}

fuzz_target!(|data: &[u8]| confined("share", |root| {
    let share = fresh_dir(root, "share");
    std::fs::write(share.join("file"), "content").unwrap();
    std::fs::create_dir(share.join("folder")).unwrap();
    symlink("../canary/file", share.join("link")).unwrap();
    let mut requests = Requests {
        share,
        begun: false,
    };
    run(&mut requests, data);
}));
