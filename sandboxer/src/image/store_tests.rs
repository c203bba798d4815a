use serde_json::json;

use super::super::testing::{Layer, Layout, gzip, zstd};
use super::*;

struct Bench {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&dir.path().join("cache"), Limits::default()).unwrap();
        Self { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unpack(&self, reference: &str) -> Result<UnpackedImage, ImageError> {
        self.store.unpack(
            reference,
            &UnpackControl::new(&AtomicBool::new(false), &|_| {}),
        )
    }

    fn content(&self, reference: &str) -> String {
        let image = self.unpack(reference).unwrap();
        fs::read_to_string(image.rootfs.join("f")).unwrap()
    }

    /// What the cache holds besides locks.
    fn cached(&self) -> Vec<String> {
        fs::read_dir(self.path("cache/images"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".lock-"))
            .collect()
    }
}

fn layer(content: &[u8]) -> Vec<u8> {
    Layer::new().file("f", content).tar()
}

#[test]
fn a_layout_is_unpacked_once() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    layout.add(
        layout.image(&[layer(b"lower"), layer(b"upper")]),
        Some("v1"),
    );
    let first = bench.unpack(&layout.reference()).unwrap();
    assert!(!first.cached);
    assert_eq!(fs::read_to_string(first.rootfs.join("f")).unwrap(), "upper");
    let again = bench.unpack(&format!("{}:v1", layout.reference())).unwrap();
    assert!(again.cached);
    assert_eq!(again.rootfs, first.rootfs);
    assert_eq!(again.config, first.config);
    assert_eq!(
        first
            .config
            .config()
            .as_ref()
            .unwrap()
            .cmd()
            .as_ref()
            .unwrap(),
        &["/bin/sh"]
    );
    assert_eq!(bench.cached().len(), 1);
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(bench.path("cache/images"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn every_compression_is_read() {
    for compress in [gzip, zstd] {
        let bench = Bench::new();
        let mut layout = Layout::new(&bench.path("image"));
        let (_, architecture) = super::super::source::host_platform();
        let big = b"words ".repeat(100_000);
        layout.add(
            layout.image_with(&[layer(&big)], architecture, compress, &json!({})),
            None,
        );
        assert_eq!(bench.content(&layout.reference()).as_bytes(), big);
    }
}

#[test]
fn archives_are_read_in_place() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    layout.add(layout.image(&[layer(b"archived")]), None);
    let archive = bench.path("image.tar");
    layout.archive(&archive);
    assert_eq!(bench.content(archive.to_str().unwrap()), "archived");
    let packed = bench.path("image.tar.gz");
    fs::write(&packed, gzip(&fs::read(&archive).unwrap())).unwrap();
    assert_eq!(bench.content(packed.to_str().unwrap()), "archived");
    assert_eq!(bench.cached().len(), 1);
}

fn docker_archive(to: &Path, images: &[(&[&str], &[u8])], wrong_config: bool) {
    let mut builder = tar::Builder::new(File::create(to).unwrap());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    };
    let (_, architecture) = super::super::source::host_platform();
    let mut manifest = Vec::new();
    for (number, (tags, content)) in images.iter().enumerate() {
        let plain = layer(content);
        let config = Layout::config(
            std::slice::from_ref(&plain),
            architecture,
            &json!({"User": "web"}),
        );
        let digest = blob::sha256(if wrong_config { b"other" } else { &config });
        let name = format!("{}.json", digest.trim_start_matches("sha256:"));
        add(&name, &config);
        add(&format!("l{number}/layer.tar"), &plain);
        manifest.push(json!({
            "Config": name, "RepoTags": tags, "Layers": [format!("l{number}/layer.tar")],
        }));
    }
    add(
        "manifest.json",
        serde_json::to_string(&manifest).unwrap().as_bytes(),
    );
    builder.finish().unwrap();
}

#[test]
fn docker_archives_are_read() {
    let bench = Bench::new();
    let path = bench.path("saved.tar");
    let text = path.to_str().unwrap();
    docker_archive(&path, &[(&["busybox:1", "busybox:latest"], b"one")], false);
    assert_eq!(bench.content(text), "one");
    let image = bench.unpack(text).unwrap();
    assert_eq!(
        image.config.config().as_ref().unwrap().user().as_deref(),
        Some("web")
    );
    docker_archive(
        &path,
        &[(&["busybox:1"], b"one"), (&["alpine:3"], b"two")],
        false,
    );
    assert_eq!(bench.content(&format!("{text}:alpine:3")), "two");
    assert_eq!(bench.content(&format!("{text}:3")), "two");
    let error = bench.unpack(text).unwrap_err().to_string();
    assert_eq!(
        error,
        "several images are here; choose one of:\n  busybox:1\n  alpine:3"
    );
    let error = bench
        .unpack(&format!("{text}:nope"))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("no image is called nope"), "{error}");
    docker_archive(&path, &[(&[], b"one")], true);
    let error = bench.unpack(text).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
}

#[test]
fn several_images_are_told_apart() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    for name in ["one", "two"] {
        layout.add(layout.image(&[layer(name.as_bytes())]), Some(name));
    }
    let error = bench.unpack(&layout.reference()).unwrap_err();
    assert!(
        matches!(&error, ImageError::Choose { choices, .. } if choices.len() == 2),
        "{error}"
    );
    assert_eq!(bench.content(&format!("{}:two", layout.reference())), "two");
    let digest = bench
        .unpack(&format!("{}:one", layout.reference()))
        .unwrap()
        .digest;
    assert_eq!(
        bench.content(&format!("{}@{digest}", layout.reference())),
        "one"
    );
}

#[test]
fn the_platform_is_found_in_nested_indexes() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    let (_, architecture) = super::super::source::host_platform();
    let mut here = layout.image(&[layer(b"here")]);
    here["platform"] = json!({"os": "linux", "architecture": architecture});
    let mut there = layout.image_with(&[layer(b"there")], "s390x", <[u8]>::to_vec, &json!({}));
    there["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let mut attestation = layout.image(&[layer(b"attestation")]);
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let inner = layout.index(&[attestation, there.clone(), here]);
    let outer = layout.index(&[inner]);
    layout.add(outer, Some("multi"));
    assert_eq!(bench.content(&layout.reference()), "here");

    let mut only = Layout::new(&bench.path("other"));
    let image = only.image_with(&[layer(b"there")], "s390x", <[u8]>::to_vec, &json!({}));
    only.add(image, None);
    let error = bench.unpack(&only.reference()).unwrap_err().to_string();
    assert!(error.contains("it has: linux/s390x"), "{error}");
    let mut deep = there;
    for _ in 0..6 {
        deep = layout.index(&[deep]);
    }
    let mut nested = Layout::new(&bench.path("image"));
    nested.add(deep, None);
    let error = bench.unpack(&nested.reference()).unwrap_err().to_string();
    assert!(error.contains("nested too deeply"), "{error}");
}

#[test]
fn damage_is_found_and_leaves_nothing() {
    type Damage = (&'static str, fn(&mut Vec<u8>));
    let damage: [Damage; 4] = [
        ("changed", |blob| *blob.last_mut().unwrap() ^= 1),
        ("cut", |blob| blob.truncate(blob.len() / 2)),
        ("longer", |blob| blob.push(0)),
        ("emptied", Vec::clear),
    ];
    for compress in [<[u8]>::to_vec as fn(&[u8]) -> Vec<u8>, gzip, zstd] {
        for (what, change) in damage {
            let bench = Bench::new();
            let mut layout = Layout::new(&bench.path("image"));
            let (_, architecture) = super::super::source::host_platform();
            let plain = layer(&b"words ".repeat(5_000));
            let stored = compress(&plain);
            layout.add(
                layout.image_with(&[plain], architecture, compress, &json!({})),
                None,
            );
            let path = layout.blob_path(&blob::sha256(&stored));
            let mut content = stored;
            change(&mut content);
            fs::write(&path, content).unwrap();
            let error = bench.unpack(&layout.reference()).unwrap_err();
            assert!(
                matches!(error, ImageError::Digest { .. } | ImageError::Layer { .. }),
                "{what}: {error}"
            );
            assert!(
                error.to_string().starts_with("layer 1 of 1 (sha256:"),
                "{error}"
            );
            assert!(bench.cached().is_empty(), "{what}: {:?}", bench.cached());
        }
    }
}

#[test]
fn wrong_documents_are_errors() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    let image = layout.image(&[layer(b"x")]);
    let manifest = layout.blob_path(image["digest"].as_str().unwrap());
    layout.add(image, None);
    let good = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, good.replace("schemaVersion", "schemaversion")).unwrap();
    let error = bench.unpack(&layout.reference()).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
    fs::remove_file(&manifest).unwrap();
    let error = bench.unpack(&layout.reference()).unwrap_err();
    assert!(matches!(error, ImageError::Malformed { .. }), "{error}");
    fs::write(layout.dir.join("index.json"), "{").unwrap();
    let error = bench.unpack(&layout.reference()).unwrap_err().to_string();
    assert!(
        error.starts_with("index.json of the image is invalid"),
        "{error}"
    );
    fs::remove_file(layout.dir.join("index.json")).unwrap();
    let error = bench.unpack(&layout.reference()).unwrap_err();
    assert!(matches!(error, ImageError::NotAnImage { .. }), "{error}");
}

#[test]
fn the_content_must_be_what_the_configuration_says() {
    let bench = Bench::new();
    let layout_dir = bench.path("image");
    let mut layout = Layout::new(&layout_dir);
    let (_, architecture) = super::super::source::host_platform();
    // The blob is intact, but not the layer the configuration promises.
    let config = layout.blob(
        "application/vnd.oci.image.config.v1+json",
        &Layout::config(&[layer(b"promised")], architecture, &json!({})),
    );
    let swapped = layout.blob("application/vnd.oci.image.layer.v1.tar", &layer(b"swapped"));
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [swapped]});
    let manifest = layout.blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    layout.add(manifest, None);
    let error = bench.unpack(&layout.reference()).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
    assert!(bench.cached().is_empty());
}

#[test]
fn what_a_crash_left_is_not_used() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    layout.add(layout.image(&[layer(b"whole")]), None);
    let digest = bench.unpack(&layout.reference()).unwrap().digest;
    let name = digest.replace(':', "-");
    let images = bench.path("cache/images");
    fs::rename(images.join(&name), images.join(format!(".partial-{name}"))).unwrap();
    fs::write(images.join(format!(".partial-{name}/rootfs/stale")), "").unwrap();
    let image = bench.unpack(&layout.reference()).unwrap();
    assert!(!image.cached);
    assert!(!image.rootfs.join("stale").exists());
    assert_eq!(bench.cached(), [name]);
}

#[test]
fn unpacking_is_single_flight() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    let many = (0..200).fold(Layer::new(), |l, n| l.file(&format!("d/{n}"), &[1; 10_000]));
    layout.add(layout.image(&[many.tar()]), None);
    let reference = layout.reference();
    let fresh = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| bench.unpack(&reference).unwrap().cached))
            .collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap())
            .filter(|c| !c)
            .count()
    });
    assert_eq!(fresh, 1);
    assert_eq!(bench.cached().len(), 1);
}

#[test]
fn cancelling_leaves_nothing() {
    let bench = Bench::new();
    let mut layout = Layout::new(&bench.path("image"));
    layout.add(layout.image(&[layer(b"one"), layer(b"two")]), None);
    let cancelled = AtomicBool::new(false);
    let second = |progress| {
        if matches!(progress, Progress::Layer { number: 2, .. }) {
            cancelled.store(true, Ordering::Relaxed);
        }
    };
    let control = UnpackControl::new(&cancelled, &second);
    let error = bench
        .store
        .unpack(&layout.reference(), &control)
        .unwrap_err();
    assert!(matches!(error, ImageError::Cancelled), "{error}");
    assert!(bench.cached().is_empty());
}

#[test]
fn a_full_disk_names_the_layer_and_leaves_nothing() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    if let Err(e) = mount(
        Some("tmpfs"),
        &small,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=256k"),
    ) {
        println!("skipped: cannot mount a tmpfs: {e}");
        return;
    }
    let check = || {
        let store = ImageStore::open(&small, Limits::default()).unwrap();
        let mut layout = Layout::new(&dir.path().join("image"));
        layout.add(layout.image(&[layer(&[1; 1 << 20])]), None);
        let control = AtomicBool::new(false);
        let error = store
            .unpack(&layout.reference(), &UnpackControl::new(&control, &|_| {}))
            .unwrap_err();
        let left = fs::read_dir(small.join("images"))
            .unwrap()
            .filter(|e| {
                !e.as_ref()
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .starts_with(".lock-")
            })
            .count();
        (error, left)
    };
    let outcome = std::panic::catch_unwind(check);
    umount2(&small, MntFlags::MNT_DETACH).unwrap();
    let (error, left) = outcome.unwrap();
    assert_eq!(
        error.os_error(),
        Some(io::ErrorKind::StorageFull),
        "{error}"
    );
    assert!(error.to_string().starts_with("layer 1 of 1"), "{error}");
    assert_eq!(left, 0);
}
