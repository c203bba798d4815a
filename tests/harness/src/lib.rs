//! Starts the real parts for end-to-end tests and counts what they leave behind.
//!
//! Nothing here fakes anything: the daemon and the CLI are the built binaries, the guest
//! is the built guest image, /dev/kvm is the host's. What is missing is said out loud.

// A test helper reports its own failures by panicking.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing
)]

pub mod cgroup;
pub mod containerd;
pub mod cri;
pub mod ctl;
pub mod daemon;
pub mod disk;
pub mod image;
pub mod kubelet;
pub mod leftovers;
pub mod netns;
pub mod pty;
pub mod rootfs;
pub mod streaming;
pub mod wasm;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// The folder that holds the binaries of the profile under test.
///
/// # Panics
/// When the test binary does not lie in a cargo target folder.
#[must_use]
pub fn bin_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("path of the running test");
    // target/<profile>/deps/<test> or target/<profile>/<bin>
    let dir = exe.parent().expect("test binary has a folder");
    if dir.ends_with("deps") {
        dir.parent().expect("deps has a parent").into()
    } else {
        dir.into()
    }
}

/// A built program, told to use the backend under test: `BACKEND=qemu` runs the pods of the
/// same tests in QEMU, anything else in-process.
///
/// # Panics
/// When `BACKEND` names none.
#[must_use]
pub fn program(name: &str) -> Command {
    let mut command = Command::new(bin_dir().join(name));
    if let Some(hypervisor) = external_backend() {
        command
            .env("KUASAR_MODE", "external")
            .env("KUASAR_HYPERVISOR", hypervisor);
    }
    command
}

/// The external hypervisor under test, if one is.
///
/// # Panics
/// When `BACKEND` names none.
#[must_use]
pub fn external_backend() -> Option<String> {
    match std::env::var("BACKEND").ok().as_deref() {
        None | Some("" | "in-process") => None,
        Some(name @ ("qemu" | "cloud-hypervisor" | "stratovirt")) => Some(name.to_owned()),
        Some(other) => {
            panic!("BACKEND={other}: use in-process, qemu, cloud-hypervisor or stratovirt")
        }
    }
}

/// Ends a test that looks at what only one backend has.
#[must_use]
pub fn not_in_process() -> Option<String> {
    external_backend().map(|name| format!("this is about in-process VMs, not {name}"))
}

/// QEMU, where Debian has it.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Cloud Hypervisor, where its releases are put.
pub const CLOUD_HYPERVISOR: &str = "/usr/local/bin/cloud-hypervisor";

/// StratoVirt, where its packages put it.
pub const STRATOVIRT: &str = "/usr/bin/stratovirt";

/// Why pods cannot run here, or `None` when they can.
#[must_use]
pub fn kvm_missing() -> Option<String> {
    if let Some(backend) = external_backend() {
        let usual = match backend.as_str() {
            "qemu" => QEMU,
            "stratovirt" => STRATOVIRT,
            _ => CLOUD_HYPERVISOR,
        };
        let program = std::env::var_os("KUASAR_HYPERVISOR_PATH").unwrap_or_else(|| usual.into());
        let missing = !Path::new(&program).exists();
        if missing {
            return Some(format!("{backend}: there is no {}", program.display()));
        }
        // It has no other vsock.
        let vsock = Path::new("/dev/vhost-vsock");
        let missing = backend == "stratovirt" && !vsock.exists();
        return missing.then(|| format!("{backend} needs {}", vsock.display()));
    }
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/kvm cannot be opened: {error}")),
    }
}

/// Asks `done` until it returns a value, for at most `limit`.
///
/// The one polling helper, for facts that have no event to wait for (an fd table of another
/// process, say).
///
/// # Panics
/// When `limit` passes; the message is `what`.
pub fn eventually<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(
            start.elapsed() < limit,
            "{what} did not happen within {limit:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How far the clock of a guest was from this host's when it last wrote the time to `file`, as
/// `echo $EPOCHREALTIME > FILE` does.
#[must_use]
pub fn clock_error(file: &Path) -> Option<Duration> {
    let guest: f64 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
    let host = std::fs::metadata(file).ok()?.modified().ok()?;
    let host = host.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(host.abs_diff(Duration::from_secs_f64(guest)))
}

/// Ends a test early, saying why, when `$reason` is `Some`.
#[macro_export]
macro_rules! skip_if {
    ($reason:expr) => {
        if let Some(why) = $reason {
            eprintln!("skipped: {why}");
            return;
        }
    };
}
