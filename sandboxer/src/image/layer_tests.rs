use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::AtomicBool;

use super::super::testing::Layer;
use super::*;

struct Applied {
    dir: tempfile::TempDir,
    result: Result<(), ImageError>,
}

impl Applied {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn has(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    fn ok(self) -> Self {
        if let Err(e) = &self.result {
            panic!("{e}: {:?}", std::error::Error::source(e));
        }
        self
    }

    /// The error, after checking that nothing left the root.
    fn error(self) -> String {
        let outside: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(outside.len(), 2, "{outside:?}");
        assert_eq!(
            fs::read_to_string(self.dir.path().join("victim")).unwrap(),
            "host"
        );
        self.result.unwrap_err().to_string()
    }
}

fn apply_within(layers: Vec<Layer>, limits: &Limits) -> Applied {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("victim"), "host").unwrap();
    let rootfs = dir.path().join("root");
    fs::create_dir(&rootfs).unwrap();
    let root = RootDir::open(&rootfs).unwrap();
    let cancelled = AtomicBool::new(false);
    let control = UnpackControl::new(&cancelled, &|_| {});
    let mut unpacker = LayerUnpacker::new(&root, limits, &control);
    let result = layers
        .into_iter()
        .try_for_each(|layer| unpacker.apply(&mut layer.tar().as_slice(), "layer"));
    Applied { dir, result }
}

fn apply(layers: Vec<Layer>) -> Applied {
    apply_within(layers, &Limits::default())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn later_layers_replace_and_merge() {
    let done = apply(vec![
        Layer::new()
            .dir("etc", 0o755)
            .file("etc/a", b"one")
            .file("etc/b", b"one")
            .dir("d", 0o755)
            .file("d/x", b"x")
            .file("f", b"file"),
        Layer::new()
            .dir("etc", 0o700)
            .file("etc/a", b"two")
            .file("d", b"now a file")
            .dir("f", 0o755)
            .file("f/inside", b"y"),
    ])
    .ok();
    assert_eq!(done.read("etc/a"), "two");
    assert_eq!(done.read("etc/b"), "one");
    assert_eq!(done.read("d"), "now a file");
    assert_eq!(done.read("f/inside"), "y");
    assert_eq!(done.path("etc").metadata().unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn entries_go_through_links_inside_the_image() {
    let done = apply(vec![
        Layer::new()
            .dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .symlink("abs", "/usr"),
        Layer::new()
            .file("lib/libc.so", b"libc")
            .file("abs/share/doc", b"doc")
            .hard_link("abs/same", "lib/libc.so"),
    ])
    .ok();
    assert_eq!(done.read("usr/lib/libc.so"), "libc");
    assert_eq!(done.read("usr/share/doc"), "doc");
    assert_eq!(done.read("usr/same"), "libc");
    assert!(done.path("lib").symlink_metadata().unwrap().is_symlink());
}

#[test]
fn metadata_is_kept() {
    let mut layer = Layer::new();
    layer.mtime = 1_234_567;
    if is_root() {
        layer.uid = 1000;
        layer.gid = 2000;
    }
    let done = apply(vec![
        layer
            .dir("d", 0o1777)
            .file_mode("d/su", b"x", 0o4755)
            .symlink("d/link", "su")
            .pax(&[("mtime", b"42.25")])
            .file("d/exact", b""),
    ])
    .ok();
    let of = |name: &str| done.path(name).symlink_metadata().unwrap();
    assert_eq!(of("d").mode() & 0o7777, 0o1777);
    assert_eq!(of("d/su").mode() & 0o7777, 0o4755);
    for name in ["d", "d/su", "d/link"] {
        assert_eq!(of(name).mtime(), 1_234_567, "{name}");
        if is_root() {
            assert_eq!((of(name).uid(), of(name).gid()), (1000, 2000), "{name}");
        }
    }
    assert_eq!(
        (of("d/exact").mtime(), of("d/exact").mtime_nsec()),
        (42, 250_000_000)
    );
}

#[test]
fn special_files_are_made() {
    let mut layer = Layer::new().node(EntryType::Fifo, "pipe", 0, 0);
    if is_root() {
        layer = layer
            .node(EntryType::Char, "null", 1, 3)
            .node(EntryType::Block, "disk", 8, 1);
    }
    let done = apply(vec![layer]).ok();
    let of = |name: &str| done.path(name).symlink_metadata().unwrap();
    assert!(of("pipe").file_type().is_fifo());
    assert_eq!(of("pipe").mode() & 0o777, 0o620);
    if is_root() {
        assert!(of("null").file_type().is_char_device());
        assert_eq!(of("null").rdev(), rustix::fs::makedev(1, 3));
        assert!(of("disk").file_type().is_block_device());
    }
}

#[test]
fn attributes_of_containers_are_kept_and_overlayfs_ones_dropped() {
    let done = apply(vec![
        Layer::new()
            .pax(&[
                ("SCHILY.xattr.user.note", b"hi\0there"),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ])
            .file("f", b""),
    ])
    .ok();
    let mut names = Vec::with_capacity(1024);
    rustix::fs::listxattr(done.path("f"), rustix::buffer::spare_capacity(&mut names)).unwrap();
    let names = String::from_utf8(names).unwrap();
    assert!(!names.contains("overlay"), "{names}");
    if !names.contains("user.note") {
        println!("skipped: no user attributes on this file system");
        return;
    }
    let mut value = Vec::with_capacity(64);
    rustix::fs::getxattr(
        done.path("f"),
        "user.note",
        rustix::buffer::spare_capacity(&mut value),
    )
    .unwrap();
    assert_eq!(value, b"hi\0there");
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let lower = || {
        Layer::new()
            .file("a/old", b"")
            .file("a/deep/old", b"")
            .file("gone", b"")
            .file("tree/x", b"")
    };
    let done = apply(vec![
        lower(),
        Layer::new()
            .file("a/new", b"")
            .file("a/.wh..wh..opq", b"")
            .file("a/later", b"")
            .file(".wh.gone", b"")
            .file(".wh.tree", b"")
            .file(".wh.never-there", b"")
            .file("no/such/.wh.folder", b"")
            .file("kept", b"")
            .file(".wh.kept", b"")
            .file(".wh..wh.plnk", b""),
    ])
    .ok();
    for name in ["a/new", "a/later", "kept"] {
        assert!(done.has(name), "{name}");
    }
    for name in [
        "a/old",
        "a/deep",
        "gone",
        "tree",
        ".wh.gone",
        "a/.wh..wh..opq",
        "no",
        ".wh..wh.plnk",
    ] {
        assert!(!done.has(name), "{name}");
    }
}

#[test]
fn whiteouts_do_not_follow_links() {
    let done = apply(vec![
        Layer::new().file("real/f", b"").symlink("link", "real"),
        Layer::new().file(".wh.link", b""),
    ])
    .ok();
    assert!(done.has("real/f") && !done.has("link"));
}

#[test]
fn a_root_entry_sets_the_root() {
    let done = apply(vec![
        Layer::new()
            .raw(EntryType::Directory, "./", "", b"")
            .file("./f", b"x"),
    ])
    .ok();
    assert_eq!(done.read("f"), "x");
    assert_eq!(done.path("").metadata().unwrap().mode() & 0o777, 0o644);
    let error = apply(vec![Layer::new().raw(
        EntryType::Symlink,
        "./",
        "/etc",
        b"",
    )])
    .error();
    assert!(error.contains("would replace the root"), "{error}");
}

#[test]
fn climbing_paths_are_refused() {
    for (kind, name, link) in [
        (EntryType::Regular, "../victim", ""),
        (EntryType::Regular, "a/../../victim", ""),
        (EntryType::Directory, "..", ""),
        (EntryType::Regular, "a/..", ""),
        (EntryType::Link, "stolen", "../victim"),
        (EntryType::Regular, "..//.wh.victim", ""),
    ] {
        let error = apply(vec![Layer::new().raw(kind, name, link, b"")]).error();
        assert!(error.contains("climbs"), "{name}: {error}");
    }
    for name in [".wh...", ".wh..", ".wh."] {
        let error = apply(vec![Layer::new().raw(EntryType::Regular, name, "", b"")]).error();
        assert!(error.contains("whiteout of no name"), "{name}: {error}");
    }
}

#[test]
fn links_cannot_lead_out() {
    // Absolute names and links count from the image's root.
    let done = apply(vec![
        Layer::new()
            .raw(EntryType::Symlink, "up", "../..", b"")
            .raw(EntryType::Symlink, "top", "/", b"")
            .raw(EntryType::Regular, "up/victim", "", b"guest")
            .raw(EntryType::Regular, "top/other", "", b"guest")
            .raw(EntryType::Regular, "/abs", "", b"guest"),
    ])
    .ok();
    for name in ["victim", "other", "abs"] {
        assert_eq!(done.read(name), "guest");
    }
    assert_eq!(
        fs::read_to_string(done.dir.path().join("victim")).unwrap(),
        "host"
    );
    // Writing to a link replaces it.
    let done = apply(vec![
        Layer::new()
            .raw(EntryType::Symlink, "leak", "../victim", b"")
            .raw(EntryType::Regular, "leak", "", b"guest"),
    ])
    .ok();
    assert_eq!(done.read("leak"), "guest");
    assert_eq!(
        fs::read_to_string(done.dir.path().join("victim")).unwrap(),
        "host"
    );
    // A hard link to a link links the link; to the outside it fails.
    let error = apply(vec![
        Layer::new()
            .raw(EntryType::Symlink, "up", "../..", b"")
            .raw(EntryType::Link, "stolen", "up/victim", b""),
    ])
    .error();
    assert!(error.contains("stolen"), "{error}");
    let error = apply(vec![Layer::new().raw(
        EntryType::Link,
        "stolen",
        "/etc/passwd",
        b"",
    )])
    .error();
    assert!(error.contains("stolen"), "{error}");
}

#[test]
fn magic_links_are_not_followed() {
    let error = apply(vec![
        Layer::new()
            .raw(EntryType::Symlink, "p", "/proc/self/cwd", b"")
            .raw(EntryType::Regular, "p/file", "", b"x"),
    ]);
    // In the root there is no /proc: the link dangles.
    assert!(error.error().contains("p/file"));
}

#[test]
fn bounds_hold() {
    let few = Limits {
        max_entries: 2,
        max_bytes: 1 << 20,
    };
    let error = apply_within(
        vec![
            Layer::new().file("a", b"").file("b", b""),
            Layer::new().file("c", b""),
        ],
        &few,
    )
    .error();
    assert_eq!(error, "layer: the image has more than 2 entries");
    let small = Limits {
        max_entries: 10,
        max_bytes: 64 << 10,
    };
    let error = apply_within(vec![Layer::new().file("a", &[1; 70_000])], &small).error();
    assert_eq!(error, "layer: the image has more than 65536 bytes");
    let error = apply_within(
        vec![
            Layer::new().file("a", &[1; 40_000]),
            Layer::new().file("b", &[1; 40_000]),
        ],
        &small,
    )
    .error();
    assert_eq!(error, "layer: the image has more than 65536 bytes");
    let long = format!("{}f", "d/".repeat(2100));
    let error = apply(vec![Layer::new().file(&long, b"")]).error();
    assert!(error.contains("path too long"), "{error}");
    let deep = format!("{}f", "d/".repeat(300));
    let error = apply(vec![Layer::new().file(&deep, b"")]).error();
    assert!(error.contains("nested too deeply"), "{error}");
}

#[test]
fn depth_through_links_is_bounded_too() {
    let deep = "d/".repeat(200);
    let error = apply(vec![
        Layer::new()
            .dir(&deep, 0o755)
            .symlink("short", deep.trim_end_matches('/'))
            .dir(&format!("short/{deep}"), 0o755),
    ])
    .error();
    assert!(error.contains("nested too deeply"), "{error}");
}

#[test]
fn huge_headers_are_refused_before_they_fill_memory() {
    let error = apply(vec![Layer::new().raw(
        EntryType::GNULongName,
        "x",
        "",
        &vec![b'a'; 3 << 20],
    )])
    .error();
    assert!(error.contains("longer than any name"), "{error}");
    // The bound is for one entry, not for all.
    let many = (0..3000).fold(Layer::new(), |layer, n| {
        layer
            .pax(&[("SCHILY.xattr.user.x", &[b'v'; 400])])
            .file(&format!("f{n}"), &[0; 100])
    });
    apply(vec![many]).ok();
}

#[test]
fn broken_archives_are_errors() {
    let root = tempfile::tempdir().unwrap();
    let opened = RootDir::open(root.path()).unwrap();
    let cancelled = AtomicBool::new(false);
    let control = UnpackControl::new(&cancelled, &|_| {});
    let limits = Limits::default();
    let tar = Layer::new().file("f", &[1; 5000]).tar();
    for broken in [&tar[..2000], &tar[..600], &b"no tar".repeat(300)[..]] {
        let mut unpacker = LayerUnpacker::new(&opened, &limits, &control);
        let error = unpacker.apply(&mut &*broken, "layer 1").unwrap_err();
        assert!(matches!(error, ImageError::Layer { .. }), "{error}");
        assert!(error.to_string().starts_with("layer 1: "), "{error}");
        let _ = fs::remove_file(root.path().join("f"));
    }
    cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut unpacker = LayerUnpacker::new(&opened, &limits, &control);
    let error = unpacker.apply(&mut tar.as_slice(), "layer 1").unwrap_err();
    assert!(matches!(error, ImageError::Cancelled), "{error}");
}

#[test]
fn pax_times() {
    let time = |text| pax_time(text).map(|t| (t.tv_sec, t.tv_nsec));
    assert_eq!(time("12"), Some((12, 0)));
    assert_eq!(time("12.5"), Some((12, 500_000_000)));
    assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
    assert_eq!(time("1.0000000019"), Some((1, 1)));
    for text in ["", "x", "1.x", "1.-5"] {
        assert_eq!(time(text), None, "{text}");
    }
}
