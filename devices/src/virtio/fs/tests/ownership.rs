//! Who owns what a guest creates, and with which mode.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use super::client::{Client, ROOT};

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root to act for other users");
    }
    root
}

/// The umask that threads of this process have unless they part with it.
fn process_umask() -> String {
    fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .find(|line| line.starts_with("Umask"))
        .unwrap()
        .to_owned()
}

#[test]
fn files_belong_to_the_guests_user() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut client = Client::new(dir.path());
    for (uid, gid) in [(1234, 5678), (0, 5678), (1234, 0), (0, 0)] {
        client.uid = uid;
        client.gid = gid;
        let name = |kind: &str| format!("{kind}-{uid}-{gid}");
        client
            .create(ROOT, &name("file"), libc::O_RDWR, 0o644)
            .unwrap();
        client.mkdir(ROOT, &name("dir")).unwrap();
        client.symlink(ROOT, &name("link"), "x").unwrap();
        client
            .mknod(ROOT, &name("fifo"), libc::S_IFIFO | 0o600, 0)
            .unwrap();
        for kind in ["file", "dir", "link", "fifo"] {
            let meta = fs::symlink_metadata(dir.path().join(name(kind))).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (uid, gid), "{kind}");
        }
    }
    client.uid = u32::MAX;
    assert_eq!(client.mkdir(ROOT, "nobody"), Err(libc::EINVAL));
}

#[test]
fn the_host_checks_the_creating_user() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut client = Client::new(dir.path());
    client.uid = 1234;
    client.gid = 1234;
    assert_eq!(client.mkdir(ROOT, "not-mine"), Err(libc::EACCES));
    // Groups of this process must not help either.
    chown(dir.path(), Some(1), Some(0)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o775)).unwrap();
    assert_eq!(client.mkdir(ROOT, "not-mine"), Err(libc::EACCES));
    // The worker is root again afterwards.
    client.uid = 0;
    client.gid = 0;
    client.mkdir(ROOT, "mine").unwrap();
}

#[test]
fn modes_are_the_guests_own() {
    let before = process_umask();
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    client.uid = nix::unistd::geteuid().as_raw();
    client.gid = nix::unistd::getegid().as_raw();
    client.create(ROOT, "f", libc::O_RDWR, 0o666).unwrap();
    let mode = |name: &str| {
        let meta = fs::symlink_metadata(dir.path().join(name)).unwrap();
        meta.permissions().mode() & 0o7777
    };
    assert_eq!(mode("f"), 0o666);
    client.mknod(ROOT, "p", libc::S_IFIFO | 0o622, 0).unwrap();
    assert_eq!(mode("p"), 0o622);
    // The rest of the process keeps its umask.
    assert_eq!(process_umask(), before);
    assert_ne!(before, "Umask:\t0000");
}

#[test]
fn set_id_bits_fall_when_the_guest_says_so() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, "x").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let set = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    set();
    // A truncation by a user with the capability, then by one without.
    client.setattr(node, 8, 0, 0, 0).unwrap();
    assert_eq!(mode(), 0o6755);
    client.setattr(node, 8 | 0x800, 1, 0, 0).unwrap();
    assert_eq!(mode(), 0o755);
    // The worker has its capability back.
    set();
    client.setattr(node, 8, 0, 0, 0).unwrap();
    assert_eq!(mode(), 0o6755);
}
