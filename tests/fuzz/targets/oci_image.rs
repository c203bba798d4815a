//! Layers of a container image: any entries in any order, unpacked into a folder that they
//! must not leave.
#![no_main]

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use fuzz::{Result, Unstructured, confined, fresh_dir};
use libfuzzer_sys::fuzz_target;
use sandboxer::image::{ImageStore, Limits, UnpackControl};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

const MAX_LAYERS: usize = 3;
const MAX_ENTRIES: usize = 12;

/// Parts that names and link targets are made of.
const PARTS: [&str; 12] = [
    "a",
    "b",
    "c",
    "..",
    ".",
    "",
    "canary",
    "file",
    ".wh.a",
    ".wh.b",
    ".wh..wh..opq",
    "share",
];

const KINDS: [EntryType; 9] = [
    EntryType::Regular,
    EntryType::Directory,
    EntryType::Symlink,
    EntryType::Link,
    EntryType::Char,
    EntryType::Fifo,
    EntryType::GNULongName,
    EntryType::XHeader,
    EntryType::GNUSparse,
];

fn name(input: &mut Unstructured<'_>) -> Result<String> {
    let count = input.int_in_range(1..=4)?;
    let parts = (0..count)
        .map(|_| input.choose(&PARTS).copied())
        .collect::<Result<Vec<_>>>()?;
    let root = if input.ratio(1, 4)? { "/" } else { "" };
    Ok(format!("{root}{}", parts.join("/")))
}

fn layer(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for _ in 0..input.int_in_range(0..=MAX_ENTRIES)? {
        let mut header = Header::new_gnu();
        header.set_entry_type(*input.choose(&KINDS)?);
        header.set_mode(input.int_in_range(0..=0o7777)?);
        header.set_mtime(0);
        set(&mut header.as_old_mut().name, name(input)?.as_bytes());
        set(&mut header.as_old_mut().linkname, name(input)?.as_bytes());
        let len = input.int_in_range(0..=64_usize)?.min(input.len());
        let content = input.bytes(len)?;
        // Truthful, mostly.
        header.set_size(if input.ratio(15, 16)? {
            u64::try_from(len).unwrap_or(0)
        } else {
            input.arbitrary()?
        });
        header.set_cksum();
        let _ = builder.append(&header, content);
    }
    Ok(builder.into_inner().unwrap_or_default())
}

/// Names as they are: the builder would refuse the interesting ones.
fn set(field: &mut [u8], value: &[u8]) {
    for (to, from) in field.iter_mut().zip(value) {
        *to = *from;
    }
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A docker archive of the layers.
fn archive(path: &Path, layers: &[Vec<u8>]) {
    let diff_ids: Vec<_> = layers
        .iter()
        .map(|l| format!("sha256:{}", hex(l)))
        .collect();
    let names: Vec<_> = (0..layers.len()).map(|n| format!("{n}.tar")).collect();
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": null, "Layers": names}]);
    let mut builder = Builder::new(File::create(path).unwrap());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("manifest.json", manifest.to_string().as_bytes());
    add("config.json", config.to_string().as_bytes());
    for (name, layer) in names.iter().zip(layers) {
        add(name, layer);
    }
    builder.finish().unwrap();
}

fn play(root: &Path, input: &mut Unstructured<'_>) -> Result<()> {
    let layers = (0..input.int_in_range(1..=MAX_LAYERS)?)
        .map(|_| layer(input))
        .collect::<Result<Vec<_>>>()?;
    let folder = fresh_dir(root, "share");
    let image = folder.join("image.tar");
    archive(&image, &layers);
    let cache = folder.join("cache");
    let limits = Limits {
        max_entries: 64,
        max_bytes: 1 << 20,
    };
    let store = ImageStore::open(&cache, limits).unwrap();
    let control = AtomicBool::new(false);
    let result = store.unpack(
        image.to_str().unwrap(),
        &UnpackControl::new(&control, &|_| {}),
    );
    // All or nothing: what failed leaves no folder behind.
    let folders = fs::read_dir(cache.join("images"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir())
        .count();
    assert_eq!(folders, usize::from(result.is_ok()), "{result:?}");
    Ok(())
}

fuzz_target!(|data: &[u8]| confined("share", |root| {
    let _ = play(root, &mut Unstructured::new(data));
}));
