//! Disk images, made and read with the tools of their file systems.

use std::fs::File;
use std::path::Path;
use std::process::Command;

/// Why there are no disk images here, or `None`.
#[must_use]
pub fn tools_missing() -> Option<String> {
    ["mkfs.ext4", "mkfs.erofs", "debugfs", "e2fsck"]
        .into_iter()
        .find(|tool| Command::new(tool).arg("-V").output().is_err())
        .map(|tool| format!("{tool} is missing (scripts/setup)"))
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("start a tool");
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Makes an ext4 image of `mib` MiB that holds `folder`, if any; returns its path.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn ext4(path: &Path, mib: u64, folder: Option<&Path>) -> String {
    let image = File::create(path).and_then(|file| file.set_len(mib << 20));
    image.expect("create the image");
    match folder {
        Some(folder) => run("mkfs.ext4", &["-q", "-d", text(folder), text(path)]),
        None => run("mkfs.ext4", &["-q", text(path)]),
    };
    text(path).to_owned()
}

/// Makes an erofs image that holds `folder`; returns its path.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn erofs(path: &Path, folder: &Path) -> String {
    run("mkfs.erofs", &[text(path), text(folder)]);
    text(path).to_owned()
}

/// Replays the journal of an ext4 image and repairs what that leaves.
///
/// # Panics
/// When the file system is beyond repair.
pub fn recover(image: &str) {
    let checked = Command::new("e2fsck")
        .args(["-fp", image])
        .output()
        .expect("start e2fsck");
    // 1: something was repaired.
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
}

/// What the file `name` on an ext4 image holds.
///
/// # Panics
/// When the image cannot be read.
#[must_use]
pub fn read(image: &str, name: &str) -> String {
    run("debugfs", &["-R", &format!("cat {name}"), image])
}
