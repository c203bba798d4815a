//! The session across a pause, and in another process.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::client::{Client, ROOT, fields, op, u64_at};
use crate::virtio::fs::{Fs, FsConfig};
use crate::virtio::{StateError, VirtioDevice, state_tests};

impl Client {
    fn pause(&mut self) -> Vec<u8> {
        self.driver.device.quiesce();
        self.driver.device.save().unwrap()
    }

    /// The same guest on a fresh device over `root`.
    fn restore(&mut self, state: &[u8], root: &Path) {
        let mut device = Fs::new(config(root)).unwrap();
        let begin = std::time::Instant::now();
        device.restore(state).unwrap();
        println!("fs: restored in {:?}", begin.elapsed());
        self.driver.device = device;
        self.driver.activate().unwrap();
    }

    /// Names from `offset` on, at most `size` bytes of them, and where it goes on.
    fn list(&mut self, node: u64, fh: u64, mut offset: u64, size: u32) -> (Vec<String>, u64) {
        let body = fields().u64(fh).u64(offset).u32(size).u32(0).u64(0).u32(0);
        let reply = self.call(op::READDIR, node, body.u32(0), size as usize);
        let reply = reply.unwrap();
        let (mut rest, mut names) = (reply.as_slice(), Vec::new());
        while !rest.is_empty() {
            let len = super::client::u32_at(rest, 16) as usize;
            names.push(String::from_utf8(rest[24..24 + len].to_vec()).unwrap());
            offset = u64_at(rest, 8);
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
        (names, offset)
    }

    fn rename(&mut self, from: u64, old: &str, to: u64, new: &str) {
        let body = fields().u64(to).u32(0).u32(0).name(old).name(new);
        self.call(op::RENAME2, from, body, 0).unwrap();
    }
}

fn config(root: &Path) -> FsConfig {
    let mut config = FsConfig::new("share", root.to_owned());
    config.writeback = true;
    config
}

/// Whose numbers a test uses after a restore.
struct Known {
    sub: u64,
    kept: (u64, u64),
    renamed: (u64, u64),
    appended: (u64, u64),
    removed: (u64, u64),
    link: u64,
    listing: (u64, u64),
    listed: Vec<String>,
}

/// A share with most that can happen to a file.
fn use_share(client: &mut Client) -> Known {
    let sub = client.mkdir(ROOT, "sub").unwrap().node;
    let deep = client.mkdir(sub, "deep").unwrap().node;
    let create = |client: &mut Client, parent, name: &str, flags| {
        let (entry, fh) = client.create(parent, name, flags, 0o644).unwrap();
        client.write(entry.node, fh, 0, name.as_bytes()).unwrap();
        (entry.node, fh)
    };
    let kept = create(client, deep, "kept", libc::O_RDWR);
    let renamed = create(client, ROOT, "before", libc::O_RDWR);
    client.rename(ROOT, "before", deep, "after (deleted)");
    let appended = create(client, ROOT, "appended", libc::O_WRONLY | libc::O_APPEND);
    let removed = create(client, sub, "removed", libc::O_RDWR);
    client
        .call(op::UNLINK, sub, fields().name("removed"), 0)
        .unwrap();
    let link = client.symlink(ROOT, "link", "sub/deep").unwrap().node;
    let many = client.mkdir(ROOT, "many").unwrap().node;
    for number in 0..40 {
        create(client, many, &format!("file{number:02}"), libc::O_RDWR);
    }
    let fh = client.opendir(many).unwrap();
    let (listed, _) = client.list(many, fh, 0, 200);
    Known {
        sub,
        kept,
        renamed,
        appended,
        removed,
        link,
        listing: (many, fh),
        listed,
    }
}

/// Everything goes on; what had no name any more is there or not.
fn check(client: &mut Client, known: &Known, root: &Path, same_process: bool) {
    let (node, fh) = known.kept;
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"kept");
    client.write(node, fh, 4, b" on").unwrap();
    assert_eq!(fs::read(root.join("sub/deep/kept")).unwrap(), b"kept on");
    client.write(node, fh, 0, b"kept").unwrap();
    client.setattr(node, 1 << 3, 4, 0, 0).unwrap();
    let (node, fh) = known.renamed;
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"before");
    let (node, fh) = known.appended;
    client.write(node, fh, 8, b"!").unwrap();
    assert_eq!(fs::read(root.join("appended")).unwrap(), b"appended!");
    let target = client.call(op::READLINK, known.link, fields(), 100);
    assert_eq!(target.unwrap(), b"sub/deep");
    let (node, fh) = known.removed;
    if same_process {
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"removed");
        client.getattr(node).unwrap();
    } else {
        assert_eq!(client.read(node, fh, 0, 100), Err(libc::EBADF));
        assert_eq!(client.getattr(node), Err(libc::ESTALE));
        assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    }
    // Numbers are as before, new ones are new.
    let deep = client.lookup(known.sub, "deep").unwrap();
    assert_eq!(client.lookup(deep.node, "kept").unwrap().node, known.kept.0);
    let (new, fh) = client.create(ROOT, "new", libc::O_RDWR, 0o644).unwrap();
    assert!(new.node > known.listing.0 && fh > known.listing.1);
    client.release(new.node, fh).unwrap();
    fs::remove_file(root.join("new")).unwrap();
    let (node, fh) = known.listing;
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let (more, next) = client.list(node, fh, offset, 500);
        if more.is_empty() {
            break;
        }
        names.extend(more);
        offset = next;
    }
    names.sort();
    let all: Vec<_> = (0..40).map(|number| format!("file{number:02}")).collect();
    assert_eq!(names, all);
    assert!(known.listed.iter().all(|name| all.contains(name)));
    assert!(client.driver.runner.failures().is_empty());
}

#[test]
fn a_pause_keeps_the_session() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::with(config(dir.path()));
    let known = use_share(&mut client);
    for _ in 0..3 {
        let state = client.pause();
        client.driver.device.quiesce();
        assert_eq!(client.driver.device.save().unwrap(), state);
        client.driver.activate().unwrap();
        check(&mut client, &known, dir.path(), true);
    }
    // A reset forgets.
    client.driver.device.reset();
    client.driver.activate().unwrap();
    assert_eq!(client.getattr(known.sub), Err(libc::ESTALE));
    client.getattr(ROOT).unwrap();
}

#[test]
fn a_session_goes_on_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::with(config(dir.path()));
    let known = use_share(&mut client);
    for _ in 0..3 {
        let state = client.pause();
        client.restore(&state, dir.path());
        check(&mut client, &known, dir.path(), false);
    }
    // A position in a directory is the host's: it holds for the same directory.
    let (node, fh) = known.listing;
    let (first, offset) = client.list(node, fh, 0, 300);
    let state = client.pause();
    client.restore(&state, dir.path());
    let (rest, _) = client.list(node, fh, offset, 1 << 16);
    assert_eq!(first.len() + rest.len(), 40);
    assert!(first.iter().all(|name| !rest.contains(name)));
    // What is forgotten is gone from the next state.
    client.forget(known.removed.0, 1);
    assert!(client.pause().len() < state.len());
}

#[test]
fn a_session_goes_on_over_a_copy_of_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let (root, copy) = (dir.path().join("root"), dir.path().join("copy"));
    fs::create_dir(&root).unwrap();
    let mut client = Client::with(config(&root));
    let known = use_share(&mut client);
    let state = client.pause();
    let mut cp = Command::new("cp");
    cp.arg("-a").args([&root, &copy]);
    assert!(cp.output().unwrap().status.success());
    client.restore(&state, &copy);
    fs::rename(&root, dir.path().join("elsewhere")).unwrap();
    check(&mut client, &known, &copy, false);
}

#[test]
fn what_changed_meanwhile_is_stale() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "secret").unwrap();
    let mut client = Client::with(config(dir.path()));
    let mut nodes = Vec::new();
    for name in ["gone", "directory", "symlink", "through", "same"] {
        let parent = client.mkdir(ROOT, name).unwrap().node;
        let (entry, fh) = client.create(parent, "file", libc::O_RDWR, 0o644).unwrap();
        client.write(entry.node, fh, 0, b"inside").unwrap();
        nodes.push((parent, entry.node, fh));
    }
    let state = client.pause();
    let at = |path: &str| dir.path().join(path);
    fs::remove_dir_all(at("gone")).unwrap();
    fs::remove_file(at("directory/file")).unwrap();
    fs::create_dir(at("directory/file")).unwrap();
    fs::remove_file(at("symlink/file")).unwrap();
    symlink(outside.path().join("file"), at("symlink/file")).unwrap();
    fs::remove_dir_all(at("through")).unwrap();
    symlink(outside.path(), at("through")).unwrap();
    client.restore(&state, dir.path());
    let (same, lost) = nodes.split_last().unwrap();
    for (_, node, fh) in lost {
        assert_eq!(client.getattr(*node), Err(libc::ESTALE));
        assert_eq!(client.open(*node, libc::O_RDWR), Err(libc::ESTALE));
        assert_eq!(client.read(*node, *fh, 0, 10), Err(libc::EBADF));
        assert_eq!(client.write(*node, *fh, 0, b"x"), Err(libc::EBADF));
    }
    let parents: Vec<_> = nodes.iter().map(|(parent, ..)| *parent).collect();
    let found: Vec<_> = parents.iter().map(|node| client.getattr(*node)).collect();
    assert!(found[0].is_err() && found[3].is_err());
    assert!(found[1].is_ok() && found[2].is_ok() && found[4].is_ok());
    assert_eq!(client.read(same.1, same.2, 0, 10).unwrap(), b"inside");
    // The guest looks again and finds what is there now.
    let now = client.lookup(parents[1], "file").unwrap();
    assert_ne!(now.node, nodes[1].1);
    client.forget(nodes[1].1, 1);
    assert_eq!(client.lookup(parents[1], "file").unwrap().node, now.node);
}

#[test]
fn a_device_without_a_session_has_none_to_keep() {
    let dir = tempfile::tempdir().unwrap();
    let device = Fs::new(config(dir.path())).unwrap();
    let state = device.save().unwrap();
    let mut restored = Fs::new(config(dir.path())).unwrap();
    restored.restore(&state).unwrap();
    assert_eq!(restored.save().unwrap(), state);
}

#[test]
fn hostile_states_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = || Fs::new(config(dir.path())).unwrap();
    let mut client = Client::with(config(dir.path()));
    let (entry, _) = client.create(ROOT, "f", libc::O_RDWR, 0o644).unwrap();
    client.mkdir(ROOT, "d").unwrap();
    let state = client.pause();
    state_tests::check_hostile(&state, fresh);

    let mut others = [config(dir.path()), config(dir.path()), config(dir.path())];
    others[0].tag = "other".to_owned();
    others[1].read_only = true;
    others[2].max_inodes = 1;
    for (number, other) in others.into_iter().enumerate() {
        let err = Fs::new(other).unwrap().restore(&state).unwrap_err();
        let limited = matches!(err, StateError::Invalid { .. });
        let differs = matches!(err, StateError::Mismatch { .. });
        assert!(if number == 2 { limited } else { differs }, "{err}");
    }

    type Inode<'a> = (u64, u64, Option<(&'a [u8], u32)>);
    let restore = |inodes: &[Inode<'_>], handles: &[(u64, u64, u32)], next: u64| {
        let nothing_mapped = [(); 0];
        let session = (false, next, next, inodes, handles, &nothing_mapped[..]);
        let body = postcard::to_stdvec(&("share", false, 0_u64, Some(session))).unwrap();
        let mut device = fresh();
        device
            .restore(&state_tests::seal(2, &body))
            .map(|()| device)
    };
    restore(&[(2, 1, Some((b"f", libc::S_IFREG)))], &[(1, 2, 2)], 7).unwrap();
    // Handles of nothing, and with flags that would harm the file.
    fs::write(dir.path().join("f"), "content").unwrap();
    let flags = (libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT).cast_unsigned();
    let file = (2, 1, Some((&b"f"[..], libc::S_IFREG)));
    restore(&[file], &[(1, 99, 0), (2, 2, flags)], 7).unwrap();
    restore(&[file], &[(1, 2, u32::MAX)], 7).unwrap();
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"content");
    let long = vec![b'x'; 4096];
    for path in [
        &b""[..],
        b"/",
        b"/etc/passwd",
        b"..",
        b"../f",
        b"d/../f",
        b"d//f",
        b"./f",
        b"f\0",
        &long,
    ] {
        let Err(err) = restore(&[(2, 1, Some((path, libc::S_IFREG)))], &[], 7) else {
            panic!("{path:?}");
        };
        assert!(matches!(err, StateError::Invalid { .. }), "{err}");
    }
    for inodes in [
        &[(1, 1, None)][..],
        &[(0, 1, None)],
        &[(2, 0, None)],
        &[(2, 1, None), (2, 1, None)],
        &[(3, 1, None), (2, 1, None)],
        &[(7, 1, None)],
    ] {
        restore(inodes, &[], 7).unwrap_err();
    }
    restore(&[], &[(1, 2, 0), (1, 2, 0)], 7).unwrap_err();
    restore(&[], &[(0, 2, 0)], 7).unwrap_err();
    restore(&[], &[], u64::MAX).unwrap_err();
    assert_eq!(entry.node, 2);
}

#[test]
fn a_share_moves_before_the_guest_uses_it() {
    let (before, after) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(before.path().join("file"), "before").unwrap();
    fs::write(after.path().join("file"), "after!").unwrap();
    let move_to = |client: &Client, root: &Path| {
        let root = root.to_owned().into();
        client.driver.device.handle().move_to(&root)
    };
    let mut client = Client::unmounted(config(before.path()));
    let missing = move_to(&client, Path::new("/no/such/folder")).unwrap_err();
    assert!(missing.to_string().contains("/no/such/folder"), "{missing}");
    move_to(&client, after.path()).unwrap();
    client.init();
    let node = client.lookup(ROOT, "file").unwrap().node;
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(node, fh, 0, 64).unwrap(), b"after!");
    // Now it knows a file.
    move_to(&client, before.path()).unwrap_err();
    assert_eq!(client.read(node, fh, 0, 64).unwrap(), b"after!");
    // A driver that begins anew finds the tree that was moved to.
    client.driver.device.reset();
    client.driver.activate().unwrap();
    client.init();
    client.lookup(ROOT, "file").unwrap();
}
