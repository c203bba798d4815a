//! What a well-behaved guest does.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::client::{Attr, Client, Entry, ROOT, fields, op, u32_at, u64_at};
use crate::testing::{Buffer, DeviceDriver, process};
use crate::virtio::VirtioDevice;
use crate::virtio::fs::{CachePolicy, Fs, FsConfig, FsError};

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 31 + at / 251) % 256).unwrap())
        .collect()
}

#[test]
fn config_space_is_tag_and_queues_of_5_11_4() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = FsConfig::new("kuasar", dir.path().to_owned());
    config.request_queues = 3;
    let device = Fs::new(config).unwrap();
    let mut space = [0xff; 44];
    device.read_config(0, &mut space);
    assert_eq!(&space[..7], b"kuasar\0");
    assert_eq!(space[36..], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(device.queue_sizes().len(), 4);
    // A tag may fill its field.
    Fs::new(FsConfig::new("x".repeat(36), dir.path().to_owned())).unwrap();
}

#[test]
fn bad_configuration_names_field_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let config = |tag: &str| FsConfig::new(tag, dir.path().to_owned());
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let err = Fs::new(config(tag)).unwrap_err();
        assert!(matches!(err, FsError::Tag(_)), "{err}");
    }
    let mut many = config("t");
    many.request_queues = 17;
    let err = Fs::new(many).unwrap_err().to_string();
    assert!(err.contains("request_queues is 17"), "{err}");
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for root in [file, dir.path().join("missing")] {
        let err = Fs::new(FsConfig::new("t", root.clone())).unwrap_err();
        assert!(err.to_string().contains(&*root.to_string_lossy()), "{err}");
    }
}

#[test]
fn a_root_may_be_an_open_directory() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("here"), "").unwrap();
    let fd = std::os::fd::OwnedFd::from(fs::File::open(dir.path()).unwrap());
    let mut client = Client::with(FsConfig::new("t", fd));
    client.lookup(ROOT, "here").unwrap();
}

#[test]
fn init_negotiates_large_requests() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::unmounted(FsConfig::new("t", dir.path().to_owned()));
    let reply = client.init();
    assert_eq!((u32_at(&reply, 0), u32_at(&reply, 4) >= 31), (7, true));
    let flags = u32_at(&reply, 12);
    let has = |bit: u32| flags & 1 << bit != 0;
    assert!(
        has(5) && has(12) && has(13) && has(22) && has(28),
        "{flags:#x}"
    );
    // Writeback was not asked for, direct access is not there.
    assert!(!has(16), "{flags:#x}");
    assert_eq!(u32_at(&reply, 20), 1 << 20);
}

#[test]
fn four_mebibytes_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    let bytes = pattern(4 << 20);
    let flags = libc::O_RDWR | libc::O_CREAT;
    let (entry, fh) = client.create(ROOT, "big", flags, 0o644).unwrap();
    for (index, part) in bytes.chunks(1 << 20).enumerate() {
        let offset = (index << 20) as u64;
        assert_eq!(client.write(entry.node, fh, offset, part), Ok(1 << 20));
    }
    assert!(fs::read(dir.path().join("big")).unwrap() == bytes);
    let mut back = Vec::new();
    while back.len() < bytes.len() {
        back.extend(
            client
                .read(entry.node, fh, back.len() as u64, 1 << 20)
                .unwrap(),
        );
    }
    assert!(back == bytes);
    assert_eq!(client.read(entry.node, fh, 4 << 20, 4096), Ok(Vec::new()));
    assert_eq!(client.getattr(entry.node).unwrap().size, 4 << 20);
    client.release(entry.node, fh).unwrap();
    assert_eq!(client.read(entry.node, fh, 0, 1), Err(libc::EBADF));
}

#[test]
fn lookup_getattr_and_forget() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "12345").unwrap();
    let mut client = Client::new(dir.path());
    let entry = client.lookup(ROOT, "file").unwrap();
    let host = fs::metadata(dir.path().join("file")).unwrap();
    assert_eq!((entry.ino, entry.size), (host.ino(), 5));
    assert_eq!(entry.mode & libc::S_IFMT, libc::S_IFREG);
    assert_eq!(client.lookup(ROOT, "file").unwrap().node, entry.node);
    assert_eq!(client.lookup(ROOT, "none"), Err(libc::ENOENT));
    client.forget(entry.node, 1);
    assert_eq!(client.getattr(entry.node).unwrap().ino, host.ino());
    client.forget(entry.node, 1);
    assert_eq!(client.getattr(entry.node), Err(libc::ESTALE));
    // The same for many at once.
    let again = client.lookup(ROOT, "file").unwrap();
    let body = fields().u32(1).u32(0).u64(again.node).u64(1).0;
    let request = client.request(op::BATCH_FORGET, 0, &body);
    assert_eq!(client.send(&[Buffer::Readable(request)]).len, 0);
    assert_eq!(client.getattr(again.node), Err(libc::ESTALE));
}

#[test]
fn changes_on_the_host_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // As a projected volume is updated: a symlink is replaced by rename.
    fs::create_dir(path("v1")).unwrap();
    fs::create_dir(path("v2")).unwrap();
    symlink("v1", path("..data")).unwrap();
    let mut client = Client::new(dir.path());
    let before = client.lookup(ROOT, "..data").unwrap();
    assert_eq!(
        client.call(op::READLINK, before.node, fields(), 4096),
        Ok(b"v1".to_vec())
    );
    symlink("v2", path("tmp")).unwrap();
    fs::rename(path("tmp"), path("..data")).unwrap();
    let after = client.lookup(ROOT, "..data").unwrap();
    assert_ne!(after.node, before.node);
    assert_eq!(
        client.call(op::READLINK, after.node, fields(), 4096),
        Ok(b"v2".to_vec())
    );
}

#[test]
fn cache_policies_set_timeouts() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    for (cache, seconds, open_flags) in [
        (CachePolicy::Never, 0, 1),
        (CachePolicy::Auto, 1, 2),
        (CachePolicy::Always, 86_400, 2),
    ] {
        let mut config = FsConfig::new("t", dir.path().to_owned());
        config.cache = cache;
        let mut client = Client::with(config);
        let reply = client
            .call(op::LOOKUP, ROOT, fields().name("f"), Entry::LEN)
            .unwrap();
        assert_eq!((u64_at(&reply, 16), u64_at(&reply, 24)), (seconds, seconds));
        let node = u64_at(&reply, 0);
        let opened = client
            .call(op::OPEN, node, fields().u32(0).u32(0), 16)
            .unwrap();
        assert_eq!(u32_at(&opened, 8), open_flags);
    }
}

#[test]
fn directories_are_listed_in_steps() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..500 {
        fs::write(dir.path().join(format!("file-{number:03}")), "").unwrap();
    }
    fs::create_dir(dir.path().join("sub")).unwrap();
    symlink("x", dir.path().join("link")).unwrap();
    let mut client = Client::new(dir.path());
    for size in [200, 4096, 128 * 1024] {
        let mut listed = client.readdir(ROOT, size);
        listed.sort();
        assert_eq!(listed.len(), 502, "in steps of {size}");
        assert_eq!(listed[7].0, "file-007");
        let ino = fs::metadata(dir.path().join("file-007")).unwrap().ino();
        assert_eq!(listed[7].1, ino);
        assert_eq!(listed[500].2, u32::from(libc::DT_LNK));
        assert_eq!(listed[501].2, u32::from(libc::DT_DIR));
    }
}

#[test]
fn readdirplus_teaches_what_it_returns() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let mut client = Client::new(dir.path());
    let fh = client.opendir(ROOT).unwrap();
    let body = || {
        fields()
            .u64(fh)
            .u64(0)
            .u32(4096)
            .u32(0)
            .u64(0)
            .u32(0)
            .u32(0)
    };
    let reply = client.call(op::READDIRPLUS, ROOT, body(), 4096).unwrap();
    let entry = Entry::parse(&reply);
    assert_eq!((entry.size, entry.mode & libc::S_IFMT), (1, libc::S_IFREG));
    assert_eq!(reply.len(), 2 * (Entry::LEN + 32));
    assert_eq!(client.getattr(entry.node).unwrap().ino, entry.ino);
    client.forget(entry.node, 1);
    assert_eq!(client.getattr(entry.node), Err(libc::ESTALE));
    // No room for a single entry: nothing is learnt.
    let small = fields().u64(fh).u64(0).u32(100).u32(0).u64(0).u32(0).u32(0);
    assert_eq!(
        client.call(op::READDIRPLUS, ROOT, small, 100),
        Ok(Vec::new())
    );
}

#[test]
fn names_are_made_moved_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut client = Client::new(dir.path());
    let sub = client.mkdir(ROOT, "sub").unwrap();
    assert_eq!(sub.mode, libc::S_IFDIR | 0o755);
    assert_eq!(client.mkdir(ROOT, "sub"), Err(libc::EEXIST));
    let (file, fh) = client
        .create(sub.node, "old", libc::O_WRONLY | libc::O_EXCL, 0o600)
        .unwrap();
    client.write(file.node, fh, 0, b"text").unwrap();
    let rename =
        |old: &str, new: &str, flags| fields().u64(ROOT).u32(flags).u32(0).name(old).name(new);
    let moved = client.call(op::RENAME2, sub.node, rename("old", "new", 0), 0);
    assert_eq!(moved, Ok(Vec::new()));
    assert_eq!(fs::read(path("new")).unwrap(), b"text");
    fs::write(path("sub/old"), "other").unwrap();
    let no_replace = client.call(op::RENAME2, sub.node, rename("old", "new", 1), 0);
    assert_eq!(no_replace, Err(libc::EEXIST));
    let link = fields().u64(file.node).name("hard");
    let linked = Entry::parse(&client.call(op::LINK, ROOT, link, Entry::LEN).unwrap());
    assert_eq!(linked.node, file.node);
    assert_eq!(fs::metadata(path("hard")).unwrap().nlink(), 2);
    let soft = client.symlink(ROOT, "soft", "../anywhere").unwrap();
    assert_eq!(soft.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(
        client.call(op::READLINK, soft.node, fields(), 4096),
        Ok(b"../anywhere".to_vec())
    );
    for name in ["hard", "new", "soft"] {
        assert_eq!(
            client.call(op::UNLINK, ROOT, fields().name(name), 0),
            Ok(vec![])
        );
        fs::symlink_metadata(path(name)).unwrap_err();
    }
    // The file lives on through its handle, as it should.
    assert_eq!(client.write(file.node, fh, 4, b"!"), Ok(1));
    let rmdir = |client: &mut Client| client.call(op::RMDIR, ROOT, fields().name("sub"), 0);
    assert_eq!(rmdir(&mut client), Err(libc::ENOTEMPTY));
    fs::remove_file(path("sub/old")).unwrap();
    assert_eq!(rmdir(&mut client), Ok(vec![]));
}

#[test]
fn attributes_are_set() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, "0123456789").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    assert_eq!(
        client.setattr(node, 1, 0, 0o640, 0).unwrap().mode & 0o7777,
        0o640
    );
    assert_eq!(client.setattr(node, 8, 4, 0, 0).unwrap().size, 4);
    assert_eq!(fs::read(&path).unwrap(), b"0123");
    assert_eq!(
        client.setattr(node, 0x20, 0, 0, 1_000_000).unwrap().mtime,
        1_000_000
    );
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(
        (meta.mtime(), meta.permissions().mode() & 0o7777),
        (1_000_000, 0o640)
    );
    assert_eq!(client.setattr(node, 8, u64::MAX, 0, 0), Err(libc::EINVAL));
}

#[test]
fn the_rest_of_file_operations() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, "abc").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let flush = fields().u64(fh).u32(0).u32(0).u64(0);
    assert_eq!(client.call(op::FLUSH, node, flush, 0), Ok(vec![]));
    let fsync = || fields().u64(fh).u32(0).u32(0);
    assert_eq!(client.call(op::FSYNC, node, fsync(), 0), Ok(vec![]));
    let fallocate = fields().u64(fh).u64(0).u64(8192).u32(0).u32(0);
    assert_eq!(client.call(op::FALLOCATE, node, fallocate, 0), Ok(vec![]));
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
    let seek = |whence: i32| fields().u64(fh).u64(0).u32(whence.cast_unsigned()).u32(0);
    let hole = client
        .call(op::LSEEK, node, seek(libc::SEEK_HOLE), 8)
        .unwrap();
    assert!(u64_at(&hole, 0) <= 8192);
    let end = client.call(op::LSEEK, node, seek(libc::SEEK_END), 8);
    assert_eq!(end, Err(libc::EINVAL));
    let statfs = client.call(op::STATFS, ROOT, fields(), 80).unwrap();
    assert!(u64_at(&statfs, 0) > 0);
    // O_TRUNC comes with OPEN, O_APPEND is kept.
    client.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    fs::write(&path, "host").unwrap();
    let append = client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    client.write(node, append, 0, b"+guest").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"host+guest");
}

#[test]
fn writeback_reads_what_it_opens_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "abc").unwrap();
    let mut config = FsConfig::new("t", dir.path().to_owned());
    config.writeback = true;
    let mut client = Client::with(config);
    let node = client.lookup(ROOT, "f").unwrap().node;
    let fh = client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    assert_eq!(client.read(node, fh, 0, 16), Ok(b"abc".to_vec()));
    client.write(node, fh, 0, b"X").unwrap();
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"Xbc");
}

#[test]
fn extended_attributes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let set = |name: &str, value: &[u8]| {
        let len = u32::try_from(value.len()).unwrap();
        fields().u32(len).u32(0).name(name).bytes(value)
    };
    match client.call(op::SETXATTR, node, set("user.key", b"value"), 0) {
        Err(libc::EOPNOTSUPP) => {
            println!("skipped: the temporary directory has no user attributes");
            return;
        }
        other => assert_eq!(other, Ok(vec![])),
    }
    let get = |size| fields().u32(size).u32(0).name("user.key");
    let count = client.call(op::GETXATTR, node, get(0), 8).unwrap();
    assert_eq!(u32_at(&count, 0), 5);
    assert_eq!(
        client.call(op::GETXATTR, node, get(64), 64),
        Ok(b"value".to_vec())
    );
    assert_eq!(
        client.call(op::GETXATTR, node, get(2), 64),
        Err(libc::ERANGE)
    );
    // More than any value can have is not an allocation of that size.
    assert_eq!(
        client.call(op::GETXATTR, node, get(u32::MAX), 64),
        Ok(b"value".to_vec())
    );
    let list = client.call(op::LISTXATTR, node, fields().u32(u32::MAX).u32(0), 4096);
    assert_eq!(list, Ok(b"user.key\0".to_vec()));
    let removed = client.call(op::REMOVEXATTR, node, fields().name("user.key"), 0);
    assert_eq!(removed, Ok(vec![]));
    assert_eq!(
        client.call(op::GETXATTR, node, get(64), 64),
        Err(libc::ENODATA)
    );
    let trusted = set("trusted.overlay.opaque", b"y");
    assert_eq!(
        client.call(op::SETXATTR, node, trusted, 0),
        Err(libc::EPERM)
    );

    let mut config = FsConfig::new("t", dir.path().to_owned());
    config.xattr = false;
    let mut client = Client::with(config);
    let node = client.lookup(ROOT, "f").unwrap().node;
    assert_eq!(
        client.call(op::GETXATTR, node, get(64), 64),
        Err(libc::ENOSYS)
    );
}

#[test]
fn unmount_forgets_everything_but_the_root() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(client.call(op::DESTROY, 0, fields(), 0), Ok(vec![]));
    assert_eq!(client.getattr(node), Err(libc::ESTALE));
    assert_eq!(client.read(node, fh, 0, 1), Err(libc::EBADF));
    client.init();
    client.lookup(ROOT, "f").unwrap();
}

#[test]
fn all_queues_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = FsConfig::new("t", dir.path().to_owned());
    config.request_queues = 2;
    config.workers = 4;
    let mut client = Client::with(config);
    for queue in [1, 2, 1, 2] {
        let request = client.request(op::GETATTR, ROOT, &[0; 16]);
        let room = u32::try_from(32 + Attr::LEN).unwrap();
        let buffers = [Buffer::Readable(request), Buffer::Writable(room)];
        let used = client.driver.request(queue, &buffers);
        client.reply(&used).unwrap();
    }
    // Many at once.
    let mut waiting = 0;
    for _ in 0..100 {
        let request = client.request(op::GETATTR, ROOT, &[0; 16]);
        let room = u32::try_from(32 + Attr::LEN).unwrap();
        client.driver.queues[1].add(&[Buffer::Readable(request), Buffer::Writable(room)]);
        waiting += 1;
    }
    client.driver.queues[1].kick();
    for _ in 0..waiting {
        assert_eq!(client.driver.wait_used(1).len as usize, 32 + Attr::LEN);
    }
}

#[test]
fn reset_starts_afresh() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    client.driver.device.reset();
    client.driver.device.reset();
    let device = Fs::new(FsConfig::new("other", dir.path().to_owned())).unwrap();
    let device = std::mem::replace(&mut client.driver.device, device);
    // The same device on new rings.
    client.driver = DeviceDriver::new(device);
    client.driver.activate().unwrap();
    client.init();
    assert_eq!(client.getattr(node), Err(libc::ESTALE));
    client.lookup(ROOT, "f").unwrap();
}

#[test]
fn every_fd_is_released() {
    const NAME: &str = "virtio::fs::tests::operations::every_fd_is_released";
    if process::elsewhere(NAME) {
        return;
    }
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let dir = tempfile::tempdir().unwrap();
    let before = count();
    let mut client = Client::unmounted(FsConfig::new("t", dir.path().to_owned()));
    client.driver.device.reset();
    let inactive = count();
    client.driver.device.reset();
    assert_eq!(count(), inactive);
    drop(client);
    let mut client = Client::new(dir.path());
    for number in 0..50 {
        let name = format!("f{number}");
        client.create(ROOT, &name, libc::O_RDWR, 0o644).unwrap();
    }
    client.opendir(ROOT).unwrap();
    assert!(count() > inactive + 100);
    client.driver.device.reset();
    assert_eq!(count(), inactive);
    drop(client);
    assert_eq!(count(), before);
}
