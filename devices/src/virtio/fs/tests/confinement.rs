//! Nothing outside the share is reachable, and limits hold.

use std::fs;
use std::os::unix::fs::symlink;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::client::{Client, Entry, ROOT, fields, op};
use crate::virtio::fs::FsConfig;

#[test]
fn names_that_are_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("share/sub")).unwrap();
    fs::write(dir.path().join("secret"), "outside").unwrap();
    let mut client = Client::new(&dir.path().join("share"));
    let sub = client.lookup(ROOT, "sub").unwrap().node;
    for node in [ROOT, sub] {
        for name in [
            "..",
            ".",
            "",
            "/",
            "../secret",
            "sub/..",
            "/etc/passwd",
            "a/b",
        ] {
            assert_eq!(client.lookup(node, name), Err(libc::EINVAL), "{name}");
            assert_eq!(client.mkdir(node, name), Err(libc::EINVAL), "{name}");
            assert_eq!(client.symlink(node, name, "x"), Err(libc::EINVAL), "{name}");
            let created = client.create(node, name, libc::O_RDWR, 0o644);
            assert_eq!(created, Err(libc::EINVAL), "{name}");
            let fifo = client.mknod(node, name, libc::S_IFIFO, 0);
            assert_eq!(fifo, Err(libc::EINVAL), "{name}");
            for opcode in [op::UNLINK, op::RMDIR] {
                let removed = client.call(opcode, node, fields().name(name), 0);
                assert_eq!(removed, Err(libc::EINVAL), "{name}");
            }
            let link = fields().u64(sub).name(name);
            assert_eq!(
                client.call(op::LINK, node, link, Entry::LEN),
                Err(libc::EINVAL)
            );
            for (old, new) in [(name, "new"), ("sub", name)] {
                let rename = fields().u64(node).u32(0).u32(0).name(old).name(new);
                assert_eq!(client.call(op::RENAME2, node, rename, 0), Err(libc::EINVAL));
            }
        }
    }
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"outside");
}

#[test]
fn symlinks_lead_nowhere_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(dir.path().join("secret"), "outside").unwrap();
    let targets = [
        dir.path().join("secret"),
        dir.path().to_owned(),
        "/proc/self/root".into(),
        "/proc/self/cwd".into(),
        "/".into(),
    ];
    let mut client = Client::new(&share);
    for (number, target) in targets.iter().enumerate() {
        let name = format!("link{number}");
        symlink(target, share.join(&name)).unwrap();
        let link = client.lookup(ROOT, &name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_PATH,
            libc::O_WRONLY | libc::O_TRUNC,
        ] {
            assert_eq!(client.open(link.node, flags), Err(libc::ELOOP));
        }
        assert_eq!(client.opendir(link.node), Err(libc::ELOOP));
        assert_eq!(client.lookup(link.node, "secret"), Err(libc::ENOTDIR));
        assert_eq!(client.lookup(link.node, "etc"), Err(libc::ENOTDIR));
        // Creating "through" the link opens what is there, which is a link.
        let created = client.create(ROOT, &name, libc::O_RDWR | libc::O_TRUNC, 0o644);
        assert_eq!(created, Err(libc::ELOOP));
        let truncated = client.setattr(link.node, 8, 0, 0, 0);
        assert_eq!(truncated, Err(libc::ELOOP));
        // A mode change would have to be of the link itself.
        client.setattr(link.node, 1, 0, 0o777, 0).unwrap_err();
        // As is a change of time, which is harmless.
        client.setattr(link.node, 0x20, 0, 0, 1).unwrap();
    }
    let secret = fs::metadata(dir.path().join("secret")).unwrap();
    assert_eq!(secret.len(), 7);
    assert!(secret.modified().unwrap().elapsed().unwrap().as_secs() < 3600);
}

#[test]
fn links_of_proc_are_not_followed() {
    let mut client = Client::new(std::path::Path::new("/proc/self"));
    for name in ["root", "cwd", "exe"] {
        let link = client.lookup(ROOT, name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(client.open(link.node, libc::O_RDONLY), Err(libc::ELOOP));
        assert_eq!(client.lookup(link.node, "etc"), Err(libc::ENOTDIR));
    }
}

#[test]
fn only_files_and_directories_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    let fifo = client
        .mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0)
        .unwrap();
    // Would block for ever.
    assert_eq!(client.open(fifo.node, libc::O_RDONLY), Err(libc::EACCES));
    let opened = client.create(ROOT, "fifo", libc::O_RDONLY, 0o600);
    assert_eq!(opened, Err(libc::EACCES));
    let socket = client
        .mknod(ROOT, "socket", libc::S_IFSOCK | 0o600, 0)
        .unwrap();
    assert_eq!(client.open(socket.node, libc::O_RDWR), Err(libc::EACCES));
    // /dev/null's number, and a disk's.
    let null = client.mknod(ROOT, "null", libc::S_IFCHR | 0o666, 0x103);
    assert_eq!(null, Err(libc::EPERM));
    let disk = client.mknod(ROOT, "disk", libc::S_IFBLK | 0o666, 0x800);
    assert_eq!(disk, Err(libc::EPERM));
    let directory = client.mknod(ROOT, "directory", libc::S_IFDIR | 0o700, 0);
    assert_eq!(directory, Err(libc::EINVAL));
    client.mknod(ROOT, "whiteout", libc::S_IFCHR, 0).unwrap();
}

#[test]
fn a_read_only_share_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "content").unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    let mut config = FsConfig::new("t", dir.path().to_owned());
    config.read_only = true;
    let mut client = Client::with(config);
    let node = client.lookup(ROOT, "f").unwrap().node;
    let refused = Err(libc::EROFS);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(client.open(node, flags).map(drop), refused);
    }
    for flags in [libc::O_RDONLY, libc::O_RDWR] {
        assert_eq!(client.create(ROOT, "f", flags, 0o644).map(drop), refused);
        assert_eq!(client.create(ROOT, "n", flags, 0o644).map(drop), refused);
    }
    assert_eq!(client.mkdir(ROOT, "n").map(drop), refused);
    assert_eq!(client.symlink(ROOT, "n", "f").map(drop), refused);
    assert_eq!(client.mknod(ROOT, "n", libc::S_IFIFO, 0).map(drop), refused);
    assert_eq!(client.setattr(node, 1, 0, 0o777, 0).map(drop), refused);
    assert_eq!(client.setattr(node, 8, 0, 0, 0).map(drop), refused);
    let mut call = |opcode, body| client.call(opcode, ROOT, body, Entry::LEN).map(drop);
    assert_eq!(call(op::UNLINK, fields().name("f")), refused);
    assert_eq!(call(op::RMDIR, fields().name("d")), refused);
    assert_eq!(call(op::LINK, fields().u64(node).name("n")), refused);
    let rename = fields().u64(ROOT).u32(0).u32(0).name("f").name("n");
    assert_eq!(call(op::RENAME2, rename), refused);
    let setxattr = fields().u32(1).u32(0).name("user.a").bytes(b"x");
    assert_eq!(call(op::SETXATTR, setxattr), refused);
    assert_eq!(call(op::REMOVEXATTR, fields().name("user.a")), refused);
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(client.write(node, fh, 0, b"x").map(drop), refused);
    let fallocate = fields().u64(fh).u64(0).u64(8192).u32(0).u32(0);
    assert_eq!(
        client.call(op::FALLOCATE, node, fallocate, 0).map(drop),
        refused
    );
    assert_eq!(client.read(node, fh, 0, 16), Ok(b"content".to_vec()));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn what_a_guest_remembers_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    let mut config = FsConfig::new("t", dir.path().to_owned());
    config.max_inodes = 2;
    config.max_handles = 2;
    let mut client = Client::with(config);
    let a = client.lookup(ROOT, "a").unwrap().node;
    client.lookup(ROOT, "b").unwrap();
    assert_eq!(client.lookup(ROOT, "c"), Err(libc::ENFILE));
    // Listing without learning still works.
    assert_eq!(client.readdir(ROOT, 4096).len(), 3);
    let first = client.open(a, libc::O_RDONLY).unwrap();
    client.open(a, libc::O_RDONLY).unwrap();
    assert_eq!(client.open(a, libc::O_RDONLY), Err(libc::ENFILE));
    client.release(a, first).unwrap();
    client.open(a, libc::O_RDONLY).unwrap();
    client.forget(a, 1);
    client.lookup(ROOT, "c").unwrap();
}

#[test]
fn handles_belong_to_their_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "a").unwrap();
    fs::write(dir.path().join("b"), "b").unwrap();
    let mut client = Client::new(dir.path());
    let a = client.lookup(ROOT, "a").unwrap().node;
    let b = client.lookup(ROOT, "b").unwrap().node;
    let fh = client.open(a, libc::O_RDWR).unwrap();
    assert_eq!(client.read(b, fh, 0, 1), Err(libc::EBADF));
    assert_eq!(client.write(b, fh, 0, b"x"), Err(libc::EBADF));
    assert_eq!(client.release(b, fh), Err(libc::EBADF));
    assert_eq!(client.read(a, fh + 1, 0, 1), Err(libc::EBADF));
}

/// Unmounts when dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn mounts_made_later_are_visible_and_distinct() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["share/first", "share/second", "volume"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    fs::write(path("volume/data"), "mounted").unwrap();
    let mut client = Client::new(&path("share"));
    let before = client.lookup(ROOT, "first").unwrap();
    let bind = |target: &str| {
        let none = None::<&str>;
        mount(
            Some(&path("volume")),
            &path(target),
            none,
            MsFlags::MS_BIND,
            none,
        )
        .map(|()| Mounted(path(target)))
    };
    let Ok(_first) = bind("share/first") else {
        println!("skipped: no permission to mount");
        return;
    };
    let _second = bind("share/second").unwrap();
    let first = client.lookup(ROOT, "first").unwrap();
    let second = client.lookup(ROOT, "second").unwrap();
    assert_ne!(first.node, before.node);
    assert_ne!(first.node, second.node);
    let mut read = |directory: u64| {
        let file = client.lookup(directory, "data").unwrap();
        let fh = client.open(file.node, libc::O_RDONLY).unwrap();
        (file.node, client.read(file.node, fh, 0, 16).unwrap())
    };
    let (one, content) = read(first.node);
    assert_eq!(content, b"mounted");
    let (other, content) = read(second.node);
    assert_eq!(content, b"mounted");
    assert_ne!(one, other);
    // A mount that is gone shows what was there before.
    drop(_first);
    assert_eq!(client.lookup(ROOT, "first").unwrap().node, before.node);
}

#[test]
fn inode_numbers_of_other_file_systems_do_not_collide() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let tmpfs = |name: &str| {
        let target = dir.path().join(name);
        mount(
            Some("t"),
            &target,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .map(|()| Mounted(target))
    };
    let Ok(_a) = tmpfs("a") else {
        println!("skipped: no permission to mount");
        return;
    };
    let _b = tmpfs("b").unwrap();
    let mut client = Client::new(dir.path());
    let a = client.lookup(ROOT, "a").unwrap();
    let b = client.lookup(ROOT, "b").unwrap();
    // Both roots have the same number on the host.
    assert_ne!(a.ino, b.ino);
    assert_eq!(client.getattr(a.node).unwrap().ino, a.ino);
}
