//! ACPI: how a guest finds its devices and its CPUs unless the host makes that slow.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use e2e::World;
use harness::{kvm_missing, not_in_process, skip_if};

/// What the container prints: how its kernel was told, what it found, and who drives it.
const SCRIPT: &str = "cat /proc/cmdline; echo cpus=$(nproc); \
                      cd /sys/bus/acpi/devices && ls -d LNRO0005:*; \
                      cd /sys/bus/virtio/devices && for d in *; do \
                      echo $d $(basename $(readlink $d/driver)); done";

#[test]
fn devices_and_cpus_are_found_through_acpi() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let world = World::with_config("[vm]\ndiscovery = \"acpi\"\n[templates]\nmode = \"off\"\n");
    let rootfs = world.rootfs.to_str().unwrap();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--privileged", "--cpus", "2", "--rootfs", rootfs, "--", "/bin/sh", "-c", SCRIPT,
    ]);
    let shown = &run.expect_code(0).stdout;
    println!("{shown}");
    let cmdline = shown.lines().next().unwrap();
    assert!(!cmdline.contains("virtio_mmio.device"), "{cmdline}");
    assert!(!cmdline.contains("acpi=off"), "{cmdline}");
    // The share, the entropy device and vsock, over which all of this came.
    for line in [
        "cpus=2",
        "LNRO0005:00",
        "LNRO0005:01",
        "LNRO0005:02",
        "virtio0 virtiofs",
        "virtio1 virtio_rng",
        "virtio2 vmw_vsock_virtio_transport",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }
    world.assert_nothing_left();
}
