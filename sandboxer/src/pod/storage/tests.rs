use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;

fn prepare(
    share: &Path,
    container: &str,
    rootfs: &[RootfsMount],
    binds: &[Bind],
) -> Result<ContainerStorage> {
    let (rootfs, binds) = (rootfs.to_vec(), binds.to_vec());
    ContainerStorage::prepare(share, container, Recipe { rootfs, binds })
}

/// Whether this process may mount; prints why a test is skipped when it may not.
fn can_mount() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let tried = nix::mount::mount(
        Some(dir.path()),
        dir.path(),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    );
    match tried {
        Ok(()) => {
            nix::mount::umount(dir.path()).unwrap();
            true
        }
        Err(e) => {
            println!("skipped: this process cannot mount: {e}");
            false
        }
    }
}

fn bind_of(source: &Path, name: &str, options: &[&str]) -> Bind {
    Bind {
        source: source.to_owned(),
        name: name.to_owned(),
        options: options.iter().map(|&o| o.to_owned()).collect(),
    }
}

fn rootfs_of(source: &Path) -> Vec<RootfsMount> {
    vec![RootfsMount {
        fstype: "bind".to_owned(),
        source: source.display().to_string(),
        options: vec!["rbind".to_owned()],
        ..Default::default()
    }]
}

struct Fixture {
    root: tempfile::TempDir,
    share: PathBuf,
    image: PathBuf,
    volume: PathBuf,
}

fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let path = root.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (share, image, volume) = (folder("share"), folder("image"), folder("volume"));
    fs::write(image.join("hello"), "image").unwrap();
    fs::write(volume.join("data"), "volume").unwrap();
    Fixture {
        root,
        share,
        image,
        volume,
    }
}

#[test]
fn shows_rootfs_and_volumes_and_takes_all_back() {
    if !can_mount() {
        return;
    }
    let f = fixture();
    let socket = f.root.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let binds = [
        bind_of(&f.volume, "0", &["rbind", "rprivate"]),
        bind_of(&f.volume, "1", &["rbind", "ro"]),
        bind_of(&f.volume.join("data"), "2", &["bind"]),
        bind_of(&socket, "3", &["bind"]),
    ];
    let storage = prepare(&f.share, "c1", &rootfs_of(&f.image), &binds).unwrap();
    let c1 = f.share.join("c1");
    assert_eq!(
        fs::read_to_string(c1.join("rootfs/hello")).unwrap(),
        "image"
    );
    fs::write(c1.join("mounts/0/new"), "written").unwrap();
    assert_eq!(fs::read_to_string(f.volume.join("new")).unwrap(), "written");
    let refused = fs::write(c1.join("mounts/1/new"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::read_to_string(c1.join("mounts/2")).unwrap(), "volume");
    assert_eq!(mount_points_below(&f.share).unwrap().len(), 5);

    drop(storage);
    assert_eq!(mount_points_below(&f.share).unwrap(), Vec::<PathBuf>::new());
    assert!(!c1.exists());
    assert_eq!(fs::read_to_string(f.image.join("hello")).unwrap(), "image");
    assert_eq!(fs::read_to_string(f.volume.join("data")).unwrap(), "volume");
}

#[test]
fn a_failure_in_the_middle_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let f = fixture();
    let binds = [
        bind_of(&f.volume, "0", &["rbind"]),
        bind_of(Path::new("/nonexistent"), "1", &["rbind"]),
    ];
    let error = prepare(&f.share, "c1", &rootfs_of(&f.image), &binds).unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    assert_eq!(mount_points_below(&f.share).unwrap(), Vec::<PathBuf>::new());
    assert!(!f.share.join("c1").exists());
    assert_eq!(fs::read_to_string(f.volume.join("data")).unwrap(), "volume");
}

#[test]
fn a_link_planted_by_the_guest_is_not_followed() {
    let f = fixture();
    let outside = f.root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, f.share.join("c1")).unwrap();
    let error = prepare(&f.share, "c1", &[], &[]).unwrap_err();
    assert!(error.to_string().contains("c1"), "{error}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(f.share.join("c1").is_symlink(), "not ours to remove");
}

#[test]
fn what_is_mounted_is_never_deleted() {
    if !can_mount() {
        return;
    }
    let f = fixture();
    let storage = prepare(&f.share, "c1", &rootfs_of(&f.image), &[]).unwrap();
    let error = remove_tree(&f.share).unwrap_err();
    assert!(error.to_string().contains("still mounted"), "{error}");
    detach_below(&f.share).unwrap();
    remove_tree(&f.share).unwrap();
    assert!(f.image.join("hello").exists());
    drop(storage);
}

#[test]
fn an_option_of_a_file_system_reaches_it() {
    if !can_mount() {
        return;
    }
    let f = fixture();
    let work = f.root.path().join("work");
    let upper = f.root.path().join("upper");
    fs::create_dir(&work).unwrap();
    fs::create_dir(&upper).unwrap();
    let rootfs = [RootfsMount {
        fstype: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec![
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", f.image.display()),
        ],
    }];
    match prepare(&f.share, "c1", &rootfs, &[]) {
        Ok(_storage) => {
            let hello = f.share.join("c1/rootfs/hello");
            assert_eq!(fs::read_to_string(&hello).unwrap(), "image");
            fs::write(&hello, "changed").unwrap();
            assert_eq!(fs::read_to_string(upper.join("hello")).unwrap(), "changed");
        }
        Err(e) => println!("skipped: overlay cannot be mounted here: {e}"),
    }
    assert_eq!(fs::read_to_string(f.image.join("hello")).unwrap(), "image");
}
