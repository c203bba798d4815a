use std::os::unix::fs::MetadataExt as _;

use cpio::newc::Reader;

use super::*;

/// A minimal static ELF program: a header without segments.
fn program() -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    elf[16] = 2; // ET_EXEC
    elf[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
    elf[20] = 1; // EV_CURRENT
    elf[52] = 64; // e_ehsize
    elf
}

fn write(dir: &Path, name: &str, content: &[u8], mode: u32) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn init(dir: &Path) -> PathBuf {
    write(dir, "vmm-task", &program(), 0o755)
}

fn names_and_modes(mut archive: &[u8]) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    loop {
        let reader = Reader::new(archive).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        found.push((reader.entry().name().to_owned(), reader.entry().mode()));
        archive = reader.finish().unwrap();
    }
}

#[test]
fn holds_init_a_console_and_the_folders() {
    let dir = tempfile::tempdir().unwrap();
    let archive = Initramfs::new(init(dir.path())).archive().unwrap();
    let expected = [
        ("dev", 0o040_755),
        ("dev/console", 0o020_600),
        ("init", 0o100_755),
        ("proc", 0o040_755),
        ("root", 0o040_755),
        ("run", 0o040_755),
        ("sys", 0o040_755),
        ("tmp", 0o040_755),
    ];
    let found = names_and_modes(&archive);
    let found: Vec<_> = found.iter().map(|(n, m)| (n.as_str(), *m)).collect();
    assert_eq!(found, expected);
}

#[test]
fn same_contents_make_the_same_bytes_wherever_and_whenever() {
    let one = tempfile::tempdir().unwrap();
    let two = tempfile::tempdir().unwrap();
    let spec = |dir: &Path, order: [&str; 2]| {
        order.iter().fold(Initramfs::new(init(dir)), |spec, name| {
            spec.with(
                write(dir, name, name.as_bytes(), 0o600),
                format!("/bin/{name}"),
                0o755,
            )
        })
    };
    let first = spec(one.path(), ["a", "b"]).archive().unwrap();
    let second = spec(two.path(), ["b", "a"]).archive().unwrap();
    assert_eq!(first, second);
}

#[test]
fn other_contents_paths_or_permissions_make_another_archive() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "file", b"one", 0o600);
    let other = write(dir.path(), "other", b"two", 0o600);
    let base = Initramfs::new(init(dir.path()));
    let archives = [
        base.clone(),
        base.clone().with(&file, "/bin/a", 0o755),
        base.clone().with(&file, "/bin/b", 0o755),
        base.clone().with(&file, "/bin/a", 0o700),
        base.with(&other, "/bin/a", 0o755),
    ]
    .map(|spec| digest::of_bytes(&spec.archive().unwrap()));
    let distinct: std::collections::BTreeSet<_> = archives.iter().collect();
    assert_eq!(distinct.len(), archives.len());
}

#[test]
fn folders_of_extra_files_come_before_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "file", b"x", 0o600);
    let archive = Initramfs::new(init(dir.path()))
        .with(&file, "/usr/local/bin/x", 0o755)
        .archive()
        .unwrap();
    let names: Vec<_> = names_and_modes(&archive)
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    let at = |name: &str| names.iter().position(|n| n == name).unwrap();
    assert!(at("usr") < at("usr/local"));
    assert!(at("usr/local") < at("usr/local/bin"));
    assert!(at("usr/local/bin") < at("usr/local/bin/x"));
}

#[test]
fn built_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::new(dir.path().join("cache"));
    let spec = Initramfs::new(init(dir.path()));
    let first = spec.build(&cache).unwrap();
    let inode = fs::metadata(&first.path).unwrap().ino();
    let second = spec.build(&cache).unwrap();
    assert_eq!(first.path, second.path);
    assert_eq!(first.digest, digest::of_file(&second.path).unwrap());
    assert_eq!(inode, fs::metadata(&second.path).unwrap().ino());
}

#[test]
fn refuses_an_init_that_cannot_run() {
    let dir = tempfile::tempdir().unwrap();
    let script = write(dir.path(), "script", b"#!/bin/sh\n", 0o755);
    let plain = write(dir.path(), "plain", &program(), 0o644);
    let mut foreign = program();
    foreign[18] = 183; // EM_AARCH64
    let foreign = write(dir.path(), "foreign", &foreign, 0o755);
    for path in [script, plain, foreign] {
        let error = Initramfs::new(&path).archive().unwrap_err();
        assert!(matches!(error, GuestError::NotAnInit { .. }), "{error}");
    }
    // Test programs of cargo are dynamic.
    let error = Initramfs::new("/proc/self/exe").archive().unwrap_err();
    assert!(error.to_string().contains("shared libraries"), "{error}");
}

#[test]
fn refuses_paths_that_lead_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "file", b"x", 0o600);
    let base = Initramfs::new(init(dir.path()));
    for path in [
        "bin/x", "/", "/a//b", "/a/../b", "/./a", "/init", "/init/x", "/dev",
    ] {
        let error = base.clone().with(&file, path, 0o755).archive().unwrap_err();
        assert!(
            matches!(error, GuestError::BadEntry { .. }),
            "{path}: {error}"
        );
    }
}
