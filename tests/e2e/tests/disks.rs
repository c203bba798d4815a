//! Block devices and disk images of the host in containers.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::time::Duration;

use e2e::World;
use harness::disk::{erofs, ext4, read, recover, tools_missing};
use harness::{eventually, kvm_missing, not_in_process, skip_if};

const SLOW: Duration = Duration::from_secs(300);

/// Prints a number each time the file that it was written to is on the disk.
const SYNCED: &str = "n=0; while :; do n=$((n+1)); echo $n >> /data/count; sync; echo $n; done";

#[test]
fn containers_run_from_disks_and_keep_what_they_synced() {
    skip_if!(kvm_missing());
    skip_if!(tools_missing());
    let mut world = World::new();
    let at = |name: &str| world.scratch().join(name);
    let root = ext4(&at("root.ext4"), 24, Some(&world.rootfs));
    let lower = erofs(&at("root.erofs"), &world.rootfs);
    let data = ext4(&at("data.ext4"), 16, None);
    let raw = at("raw.img");
    fs::write(&raw, "raw disk".repeat(128)).unwrap();
    let raw = format!("{}:/dev/raw:ro", raw.display());

    // A root file system, a volume and a device; the root is written to.
    let mounted = format!("{data}:/data");
    let script = "mount | grep -q '/dev/vda on / type ext4' || exit 2; echo root > /written; \
                  echo data > /data/file; head -c 8 /dev/raw; \
                  echo x 2>&- > /dev/raw && exit 3; exit 0";
    #[rustfmt::skip]
    let ran = world.ctl.run([
        "run", "--rootfs", &root, "--disk", &mounted, "--disk", &raw, "--", "/bin/sh", "-c", script,
    ]);
    assert_eq!(ran.expect_code(0).stdout, "raw disk");
    assert_eq!(read(&root, "written"), "root\n");
    assert_eq!(read(&data, "file"), "data\n");

    // A root file system that cannot be written to has a layer in memory.
    let script = "echo layer > /written && cat /written && head -c 1 /data/file";
    let ran = world.ctl.run([
        "run",
        "--rootfs",
        &lower,
        "--disk",
        &format!("{data}:/data:ro"),
        "--",
        "/bin/sh",
        "-c",
        script,
    ]);
    assert_eq!(ran.expect_code(0).stdout, "layer\nd");
    world.assert_nothing_left();

    // The daemon, and so the pod, is killed while the guest writes.
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let ran = world.ctl.run([
        "run", "--detach", "--name", "writer", "--disk", &mounted, "--rootfs", &rootfs, "--",
        "/bin/sh", "-c", SYNCED,
    ]);
    ran.expect_code(0);
    let synced = || {
        let logs = world.ctl.run(["logs", "writer"]).stdout;
        logs.lines()
            .last()
            .and_then(|line| line.parse::<u32>().ok())
    };
    eventually("the third sync", SLOW, || synced().filter(|n| *n >= 3));
    // An image has one writer.
    #[rustfmt::skip]
    let second = world.ctl.run([
        "run", "--disk", &mounted, "--rootfs", &rootfs, "--", "/bin/true",
    ]);
    second.expect_code(125);
    assert!(second.stderr.contains("in use"), "{second:?}");
    let kept = synced().unwrap();
    world.daemon.kill();
    if not_in_process().is_some() {
        // The pod outlives the daemon.
        world.daemon.start_again();
        world.ctl.run(["rm", "--force", "writer"]).expect_code(0);
    }
    recover(&data);
    let numbers: Vec<u32> = read(&data, "count")
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    let last = u32::try_from(numbers.len()).unwrap();
    assert!(numbers.iter().copied().eq(1..=last), "{numbers:?}");
    assert!(last >= kept, "{kept} were synced, {last} are there");
}
