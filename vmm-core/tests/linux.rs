//! A real Linux guest: from the kernel's entry to a shell script as `/init`.
//!
//! `VMM_TEST_KERNEL` names the kernel; a static busybox makes the initramfs.
//! `VMM_TEST_DISCOVERY=acpi` uses ACPI where the command line is the default,
//! `VMM_TEST_PROTOCOL=pvh` the kernel's PVH entry point.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    missing_docs
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use devices::virtio::fs::{Fs, FsConfig};
use vmm_core::config::{BootProtocol, Discovery};
use vmm_core::vm::{ExitReason, Vm};
use vmm_core::{DeviceSet, Host, Machine, MachineConfig};

/// For an emulated kernel on a busy host.
const PATIENCE: Duration = Duration::from_secs(600);
const BUSYBOX: &str = "/bin/busybox";

/// What the tests need, or why they are skipped.
fn prerequisites() -> Result<(Host, PathBuf), String> {
    let kernel = std::env::var_os("VMM_TEST_KERNEL").ok_or("VMM_TEST_KERNEL is not set")?;
    if !Path::new(BUSYBOX).exists() {
        return Err(format!("{BUSYBOX} does not exist"));
    }
    let host = Host::probe().map_err(|err| err.to_string())?;
    Ok((host, PathBuf::from(kernel)))
}

/// An initramfs whose `/init` is `script`.
fn initramfs(dir: &Path, script: &str) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    for folder in ["dev", "proc", "sys"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let init = root.join("init");
    fs::write(&init, script).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let archive = dir.join("initramfs.cpio");
    let packed = Command::new("sh")
        .args(["-c", "find . | cpio --quiet -o -H newc > \"$0\""])
        .arg(&archive)
        .current_dir(&root)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(packed.success());
    archive
}

fn boot(host: &Host, kernel: &Path, vcpus: u32, script: &str) -> (Machine, ExitReason) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = MachineConfig::new(format!("linux{vcpus}"), kernel);
    config.vcpus = vcpus;
    config.initramfs = Some(initramfs(dir.path(), script));
    "quiet".clone_into(&mut config.cmdline);
    if std::env::var_os("VMM_TEST_DISCOVERY").is_some_and(|value| value == "acpi") {
        config.discovery = Discovery::Acpi;
    }
    if std::env::var_os("VMM_TEST_PROTOCOL").is_some_and(|value| value == "pvh") {
        config.protocol = BootProtocol::Pvh;
    }
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("hello"), "shared").unwrap();
    let share = Fs::new(FsConfig::new("share", share)).unwrap();
    let devices = DeviceSet::new().with_device("share", Box::new(share));
    config.devices = devices.with_rng().unwrap();
    let machine = Machine::build(host, config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let reason = runtime.block_on(async {
        machine.start().await.unwrap();
        let mut exited = machine.exited();
        let ended = tokio::time::timeout(PATIENCE, exited.wait_for(Option::is_some)).await;
        let tail = machine.console_tail();
        let reason = ended.unwrap_or_else(|_| panic!("still running: {tail:?}"));
        reason.unwrap().clone().unwrap()
    });
    println!("{vcpus} vCPUs: {:#?}", machine.stats());
    (machine, reason)
}

/// Two vCPUs come up, the entropy device and the share work, and a reboot is a reset.
#[test]
fn linux_comes_up_with_two_cpus() {
    let (host, kernel) = match prerequisites() {
        Ok(both) => both,
        Err(why) => return println!("skipped: {why}"),
    };
    let script = "#!/bin/busybox sh\n\
        /bin/busybox mount -t proc proc /proc\n\
        /bin/busybox echo cpus=$(/bin/busybox nproc)\n\
        /bin/busybox mount -t devtmpfs dev /dev\n\
        /bin/busybox echo env=$GLIBC_TUNABLES\n\
        /bin/busybox echo entropy=$(/bin/busybox head -c 32 /dev/hwrng | /bin/busybox wc -c)\n\
        /bin/busybox mount -t virtiofs share /sys\n\
        /bin/busybox echo share=$(/bin/busybox cat /sys/hello)\n\
        /bin/busybox reboot -f\n";
    let (machine, reason) = boot(&host, &kernel, 2, script);
    let console = machine.console_tail().unwrap();
    assert_eq!(reason, ExitReason::GuestReset, "{console}");
    assert!(console.contains("cpus=2"), "{console}");
    assert!(console.contains("entropy=32"), "{console}");
    assert!(console.contains("share=shared"), "{console}");
    for (_, value) in host.guest_environment() {
        assert!(console.contains(&format!("env={value}")), "{console}");
    }
}

/// A panic resets at once and is told apart by the console.
#[test]
fn a_kernel_panic_is_told_with_its_words() {
    let (host, kernel) = match prerequisites() {
        Ok(both) => both,
        Err(why) => return println!("skipped: {why}"),
    };
    // PID 1 must not end.
    let (_, reason) = boot(&host, &kernel, 1, "#!/bin/busybox sh\nexit 3\n");
    let ExitReason::GuestPanic(words) = reason else {
        panic!("{reason:?}");
    };
    assert!(words.contains("Attempted to kill init"), "{words}");
}
