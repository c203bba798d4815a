//! Files in the window, as the guest's driver asks for them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::client::{Attr, Client, Entry, ROOT, fields, op, u32_at};
use crate::testing::{Buffer, DeviceDriver, RawDescriptor};
use crate::virtio::fs::{DAX_BLOCK_BYTES as BLOCK, Fs, FsConfig};
use crate::virtio::{SharedMemory, StateError, VirtioDevice, state_tests};

const READ: u64 = 2;
const WRITE: u64 = 1;
/// Where the guest has the window.
const PLACE: u64 = 1 << 32;

fn config(root: &Path) -> FsConfig {
    FsConfig {
        dax_bytes: 4 * BLOCK,
        ..FsConfig::new("share", root.to_owned())
    }
}

fn device(root: &Path) -> Fs {
    let device = Fs::new(config(root)).unwrap();
    device.shared_memory().unwrap().place(PLACE).unwrap();
    device
}

fn client(root: &Path) -> Client {
    let mut client = Client::unmounted(config(root));
    client.driver = DeviceDriver::new(device(root));
    client.driver.activate().unwrap();
    client.init();
    client
}

impl Client {
    fn window(&self) -> Arc<SharedMemory> {
        self.driver.device.shared_memory().unwrap()
    }

    fn map(&mut self, node: u64, offset: u64, at: u64, len: u64, flags: u64) -> Result<(), i32> {
        // Linux names no open file.
        let body = fields().u64(u64::MAX).u64(offset).u64(len).u64(flags);
        self.call(op::SETUPMAPPING, node, body.u64(at), 0).map(drop)
    }

    fn unmap(&mut self, parts: &[(u64, u64)]) -> Result<(), i32> {
        let count = u32::try_from(parts.len()).unwrap();
        let body = parts.iter().fold(fields().u32(count), |body, (at, len)| {
            body.u64(*at).u64(*len)
        });
        self.call(op::REMOVEMAPPING, ROOT, body, 0).map(drop)
    }
}

fn bad_address(result: std::io::Result<impl std::fmt::Debug>) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFAULT));
}

/// `blocks` blocks, the first byte of each its number from one on.
fn content(blocks: u8) -> Vec<u8> {
    let block = usize::try_from(BLOCK).unwrap();
    let mut bytes = vec![0; block * usize::from(blocks)];
    for (number, block) in (1..).zip(bytes.chunks_mut(block)) {
        block[0] = number;
    }
    bytes
}

#[test]
fn the_guest_is_told_what_is_for_the_window() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "content").unwrap();
    for dax in [true, false] {
        let mut client = match dax {
            true => client(dir.path()),
            false => Client::new(dir.path()),
        };
        // INIT_EXT, MAP_ALIGNMENT; HAS_INODE_DAX in the second word.
        let init = fields().u32(7).u32(36).u32(0).u32(1 << 30 | 1 << 26);
        let init = init.u32(2).bytes(&[0; 44]);
        let reply = client.call(op::INIT, 0, init, 64).unwrap();
        let told = u32_at(&reply, 12) & 1 << 26 != 0;
        assert_eq!((told, u32_at(&reply, 32) & 2 != 0), (dax, dax));
        assert_eq!(u32_at(&reply, 28) >> 16, if dax { 21 } else { 0 });
        let lookup = client.call(op::LOOKUP, ROOT, fields().name("f"), Entry::LEN);
        let lookup = lookup.unwrap();
        let node = Entry::parse(&lookup).node;
        let room = 16 + Attr::LEN;
        let get = client.call(op::GETATTR, node, fields().u64(0).u64(0), room);
        let set = client.call(op::SETATTR, node, fields().bytes(&[0; 88]), room);
        let folder = client.call(op::GETATTR, ROOT, fields().u64(0).u64(0), room);
        let flags = [
            (&lookup, 40 + 84),
            (&get.unwrap(), 100),
            (&set.unwrap(), 100),
        ];
        for (reply, at) in flags {
            let overlay = dax && u32_at(reply, at) == 0;
            assert!(!overlay || on_overlay(dir.path()), "no flag");
            assert!(dax || u32_at(reply, at) == 0);
        }
        assert_eq!(u32_at(&folder.unwrap(), 100), 0);
        // An error is left as it is.
        let gone = client.call(op::GETATTR, 77, fields().u64(0).u64(0), room);
        assert_eq!(gone, Err(libc::ESTALE));
    }
}

fn on_overlay(path: &Path) -> bool {
    let kind = nix::sys::statfs::statfs(path).unwrap().filesystem_type();
    kind == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC
}

#[test]
fn parts_of_files_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, content(3)).unwrap();
    let mut client = client(dir.path());
    let window = client.window();
    let node = client.lookup(ROOT, "f").unwrap().node;
    client.map(node, BLOCK, 0, 2 * BLOCK, READ).unwrap();
    assert_eq!(window.peek(0).unwrap(), 2);
    assert_eq!(window.peek(BLOCK).unwrap(), 3);
    bad_address(window.poke(0, 9));
    bad_address(window.peek(2 * BLOCK));
    // Now to be written to: in place of what was there.
    client.map(node, BLOCK, 0, BLOCK, READ | WRITE).unwrap();
    window.poke(1, 9).unwrap();
    let at = usize::try_from(BLOCK).unwrap();
    assert_eq!(fs::read(&path).unwrap()[at..at + 2], [2, 9]);
    // The guest's own WRITE and the host's are seen.
    let fh = client.open(node, libc::O_RDWR).unwrap();
    client.write(node, fh, BLOCK + 2, b"x").unwrap();
    assert_eq!(window.peek(2).unwrap(), b'x');
    // The file is cut off, and grows again.
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(BLOCK)
        .unwrap();
    bad_address(window.peek(0));
    bad_address(window.poke(0, 1));
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(2 * BLOCK)
        .unwrap();
    assert_eq!(window.peek(0).unwrap(), 0);
    // A part is taken away, then the rest, by each of the ways there are.
    client.unmap(&[(0, BLOCK)]).unwrap();
    bad_address(window.peek(0));
    client.map(node, 0, 3 * BLOCK, BLOCK, READ).unwrap();
    assert_eq!(window.peek(3 * BLOCK).unwrap(), 1);
    client.unmap(&[(BLOCK, BLOCK), (3 * BLOCK, BLOCK)]).unwrap();
    bad_address(window.peek(3 * BLOCK));
    client.map(node, 0, 0, BLOCK, READ).unwrap();
    client.call(op::DESTROY, 0, fields(), 0).unwrap();
    bad_address(window.peek(0));
    client.init();
    let node = client.lookup(ROOT, "f").unwrap().node;
    client.map(node, 0, 0, BLOCK, READ).unwrap();
    client.driver.device.reset();
    bad_address(window.peek(0));
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "content").unwrap();
    std::os::unix::fs::symlink("f", dir.path().join("link")).unwrap();
    let mut client = client(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let link = client.lookup(ROOT, "link").unwrap().node;
    client.map(node, 0, BLOCK, BLOCK, READ).unwrap();
    for (offset, at, len, flags) in [
        (0, 0, 0, READ),
        (0, 0, 4096, READ),
        (0, 4096, BLOCK, READ),
        (4096, 0, BLOCK, READ),
        (0, 0, 5 * BLOCK, READ),
        (0, 3 * BLOCK, 2 * BLOCK, READ),
        (0, u64::MAX - BLOCK + 1, BLOCK, READ),
        (0, 0, u64::MAX - BLOCK + 1, READ),
        (0, 0, BLOCK, 0),
        (0, 0, BLOCK, READ | 4),
        (0, 0, BLOCK, u64::MAX),
    ] {
        let refused = client.map(node, offset, at, len, flags);
        assert_eq!(
            refused,
            Err(libc::EINVAL),
            "{offset:#x} {at:#x} {len:#x} {flags}"
        );
    }
    client.map(node, 1 << 62, 0, BLOCK, READ).unwrap();
    for past in [1 << 63, u64::MAX - BLOCK + 1] {
        client.map(node, past, 0, BLOCK, READ).unwrap_err();
    }
    assert_eq!(client.map(ROOT, 0, 0, BLOCK, READ), Err(libc::ENODEV));
    assert_eq!(client.map(link, 0, 0, BLOCK, READ), Err(libc::ENODEV));
    assert_eq!(client.map(99, 0, 0, BLOCK, READ), Err(libc::ESTALE));
    for part in [
        (0, 0),
        (1, BLOCK),
        (0, 1),
        (4 * BLOCK, BLOCK),
        (0, u64::MAX),
    ] {
        assert_eq!(client.unmap(&[part]), Err(libc::EINVAL), "{part:?}");
    }
    for (opcode, body) in [
        (op::SETUPMAPPING, fields().u64(0)),
        (op::REMOVEMAPPING, fields()),
        (op::REMOVEMAPPING, fields().u32(u32::MAX).u64(0)),
    ] {
        assert_eq!(client.call(opcode, node, body, 64), Err(libc::EINVAL));
    }
    // What was mapped is not touched by all that.
    assert_eq!(client.window().peek(BLOCK).unwrap(), b'c');

    let mut read_only = config(dir.path());
    read_only.read_only = true;
    let mut client = Client::with(read_only);
    let node = client.lookup(ROOT, "f").unwrap().node;
    client.map(node, 0, 0, BLOCK, READ).unwrap();
    assert_eq!(client.map(node, 0, 0, BLOCK, WRITE), Err(libc::EROFS));
    let odd = FsConfig {
        dax_bytes: BLOCK + 4096,
        ..config(dir.path())
    };
    assert!(Fs::new(odd).unwrap_err().to_string().contains("dax_bytes"));
}

#[test]
fn data_may_lie_in_the_window_but_no_more_than_that() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, content(1)).unwrap();
    fs::write(&to, "").unwrap();
    let mut client = client(dir.path());
    let mapped = client.lookup(ROOT, "from").unwrap().node;
    client.map(mapped, 0, BLOCK, BLOCK, READ | WRITE).unwrap();
    let node = client.lookup(ROOT, "to").unwrap().node;
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let at = |offset, flags| {
        Buffer::Raw(RawDescriptor {
            addr: PLACE + offset,
            len: 64,
            flags,
            next: 0,
        })
    };
    let io = |opcode| {
        let body = fields().u64(fh).u64(0).u32(64).u32(0).u64(0).u32(0).u32(0);
        let len = if opcode == op::WRITE { 144_u32 } else { 80 };
        move |client: &mut Client| {
            let mut request = client.request(opcode, node, &body.0);
            request[..4].copy_from_slice(&len.to_le_bytes());
            request
        }
    };
    let request = io(op::WRITE)(&mut client);
    let used = client.send(&[
        Buffer::Readable(request.clone()),
        at(BLOCK, 0),
        Buffer::Writable(24),
    ]);
    assert_eq!(u32_at(&client.reply(&used).unwrap(), 0), 64);
    assert_eq!(fs::read(&to).unwrap(), content(1)[..64]);
    // Where nothing is mapped.
    let used = client.send(&[Buffer::Readable(request), at(0, 0), Buffer::Writable(24)]);
    assert_eq!(client.reply(&used), Err(libc::EFAULT));

    fs::write(&to, [7; 64]).unwrap();
    let request = io(op::READ)(&mut client);
    let used = client.send(&[
        Buffer::Readable(request.clone()),
        Buffer::Writable(16),
        at(BLOCK + 32, 2),
    ]);
    assert_eq!((used.len, u32_at(&used.data, 4)), (80, 0));
    assert_eq!(
        fs::read(&from).unwrap()[31..97],
        [&[0; 1][..], &[7; 64], &[0; 1]].concat()
    );
    // The file is cut off: nobody here touches it.
    fs::write(&from, "").unwrap();
    for (buffers, error) in [
        (
            vec![
                Buffer::Readable(request.clone()),
                Buffer::Writable(16),
                at(BLOCK, 2),
            ],
            true,
        ),
        // Headers.
        (vec![Buffer::Readable(request.clone()), at(BLOCK, 2)], false),
        (vec![at(BLOCK, 0), Buffer::Writable(64)], true),
    ] {
        let used = client.send(&buffers);
        let said = used
            .data
            .get(4..8)
            .map(|code| -i32::from_le_bytes(code.try_into().unwrap()));
        assert_eq!(said, error.then_some(libc::EFAULT), "{used:?}");
    }
    // Replies that are more than a status and data.
    let request = client.request(op::GETATTR, ROOT, &[0; 16]);
    let used = client.send(&[
        Buffer::Readable(request),
        Buffer::Writable(16),
        at(BLOCK, 2),
    ]);
    assert_eq!(client.reply(&used), Err(libc::EFAULT));
    client.getattr(ROOT).unwrap();
    assert!(client.driver.runner.failures().is_empty());
}

#[test]
fn a_snapshot_keeps_what_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["kept", "lost"] {
        fs::write(dir.path().join(name), content(2)).unwrap();
    }
    let mut client = client(dir.path());
    let kept = client.lookup(ROOT, "kept").unwrap().node;
    let lost = client.lookup(ROOT, "lost").unwrap().node;
    client.map(kept, 0, BLOCK, 2 * BLOCK, READ | WRITE).unwrap();
    client.map(lost, 0, 0, BLOCK, READ).unwrap();
    client.driver.device.quiesce();
    let state = client.driver.device.save().unwrap();
    // Here it goes on as it was.
    client.driver.activate().unwrap();
    assert_eq!(client.window().peek(2 * BLOCK).unwrap(), 2);
    client.driver.device.quiesce();
    fs::remove_file(dir.path().join("lost")).unwrap();
    client.driver.device = device(dir.path());
    client.driver.device.restore(&state).unwrap();
    client.driver.activate().unwrap();
    let window = client.window();
    bad_address(window.peek(0));
    assert_eq!(window.peek(2 * BLOCK).unwrap(), 2);
    window.poke(BLOCK, 8).unwrap();
    assert_eq!(fs::read(dir.path().join("kept")).unwrap()[0], 8);

    let mut other = Fs::new(FsConfig::new("share", dir.path().to_owned())).unwrap();
    let err = other.restore(&state).unwrap_err();
    assert!(matches!(err, StateError::Mismatch { .. }), "{err}");

    // States that say what no guest could ask for.
    let restored = |mappings: &[(u64, (u64, u64, bool))]| {
        let path = (&b"kept"[..], libc::S_IFREG);
        let inodes = [(2_u64, 1_u64, Some(path)), (3, 1, None)];
        let none = [(); 0];
        let session = (false, 9_u64, 9_u64, &inodes[..], &none[..], mappings);
        let body = postcard::to_stdvec(&("share", false, 4 * BLOCK, Some(session))).unwrap();
        let mut device = device(dir.path());
        let restored = device.restore(&state_tests::seal(2, &body));
        restored.map(|()| device)
    };
    let device = restored(&[
        (0, (3, 0, false)),
        (1, (2, BLOCK, false)),
        (4, (2, 0, false)),
        (u64::MAX, (2, u64::MAX, true)),
    ]);
    let device = device.unwrap();
    let window = device.shared_memory().unwrap();
    bad_address(window.peek(0));
    assert_eq!(window.peek(BLOCK).unwrap(), 2);
    bad_address(window.poke(BLOCK, 1));
    for at in [2, 3] {
        bad_address(window.peek(at * BLOCK));
    }
    let err = restored(&[(0, (2, 0, false)); 5]).unwrap_err();
    assert!(matches!(err, StateError::Invalid { .. }), "{err}");
}
