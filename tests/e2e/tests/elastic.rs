//! Machines whose memory and CPUs come and go.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::time::Duration;

use e2e::World;
use harness::{eventually, kvm_missing, skip_if};

const SLOW: Duration = Duration::from_secs(300);

/// Room for a second CPU, and for one of Linux's memory blocks.
const CONFIG: &str = "[vm]\nmemory = \"192MiB\"\nmax_memory = \"320MiB\"\nmax_vcpus = 2\n";

const MIB: u64 = 1 << 20;

#[test]
fn memory_and_cpus_come_and_free_memory_goes_back() {
    skip_if!(kvm_missing());
    let world = World::with_config(CONFIG);
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "pod", "--rootfs", &rootfs, "--", "/bin/sleep", "1000000",
    ]);
    run.expect_code(0);
    let guest = |command: &str| {
        let exec = world
            .ctl
            .run(["exec", "pod", "--", "/bin/sh", "-c", command]);
        exec.expect_code(0).stdout.trim().to_owned()
    };
    let total = || -> u64 {
        let kib = guest("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
        kib.parse::<u64>().unwrap() << 10
    };
    let resident = || -> u64 {
        let inspect = world
            .ctl
            .run(["inspect", "pod"])
            .expect_code(0)
            .stdout
            .clone();
        let inspect: serde_json::Value = serde_json::from_str(&inspect).unwrap();
        find_number(&inspect, "resident_bytes").expect("resident_bytes")
    };

    // Filled memory is the host's again once the guest has freed it.
    let before = resident();
    guest("dd if=/dev/zero of=/dev/shm/file bs=1M count=24 2>/dev/null");
    let filled = resident();
    assert!(filled > before + 20 * MIB, "{before} {filled}");
    guest("rm /dev/shm/file");
    let limit = filled - 12 * MIB;
    let freed = eventually("free memory to go back", SLOW, || {
        Some(resident()).filter(|resident| *resident < limit)
    });
    println!("resident: {before}, filled {filled}, freed {freed}");

    // More than the machine has.
    assert_eq!(guest("nproc"), "1");
    let had = total();
    assert!(had < 192 * MIB, "{had}");
    #[rustfmt::skip]
    let update = world.ctl.run(["update", "--memory", "240MiB", "--cpus", "2", "pod"]);
    update.expect_code(0);
    assert_eq!(guest("nproc"), "2");
    let has = total();
    assert!(has >= had + 48 * MIB, "{had} {has}");
    // More than it can have.
    let update = world.ctl.run(["update", "--memory", "1GiB", "pod"]);
    update.expect_code(125);
    assert!(update.stderr.contains("vm.max_memory"), "{update:?}");

    world.ctl.run(["rm", "--force", "pod"]).expect_code(0);
    world.assert_nothing_left();
}

/// The first number of this name, however deep.
fn find_number(value: &serde_json::Value, name: &str) -> Option<u64> {
    match value {
        serde_json::Value::Object(fields) => fields
            .get(name)
            .and_then(serde_json::Value::as_u64)
            .or_else(|| fields.values().find_map(|value| find_number(value, name))),
        serde_json::Value::Array(items) => items.iter().find_map(|value| find_number(value, name)),
        _ => None,
    }
}
