//! A container root file system made of the host's static busybox.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes the root file system of `make run` at `dir/rootfs` and returns its path.
///
/// # Panics
/// When it cannot be made (busybox-static missing).
#[must_use]
pub fn busybox(dir: &Path) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/demo-rootfs");
    let rootfs = dir.join("rootfs");
    let status = Command::new(script)
        .arg(&rootfs)
        .status()
        .expect("run scripts/demo-rootfs");
    assert!(
        status.success(),
        "scripts/demo-rootfs failed (is busybox-static installed?)"
    );
    rootfs
}
