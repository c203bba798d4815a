//! Pods that stand still: in memory, and on disk while their daemon is away.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::World;
use harness::{clock_error, eventually, kvm_missing, not_in_process, skip_if};

/// Counts in a shell variable, which is nowhere but in guest memory, and writes each number to
/// the terminal, to a disk and to a file that stays open, and the time to a file before that.
const COUNT: &str = "exec 5>>/data/count; n=0; \
                     while :; do n=$((n+1)); echo $n; echo $n > /disk/count; \
                     echo $EPOCHREALTIME > /data/clock; echo $n >&5; sleep 1; done";

const SLOW: Duration = Duration::from_secs(300);

fn disk_bytes(snapshot: &Path) -> u64 {
    let memory = fs::metadata(snapshot.join("memory")).expect("the snapshot's memory");
    memory.blocks() * 512
}

fn last(text: &str) -> u32 {
    // Who reads while "9" becomes "10" may find the new end behind the old line.
    let line = text.lines().rfind(|line| !line.is_empty()).unwrap_or("0");
    let number = line.parse();
    number.unwrap_or_else(|e| panic!("{e} in the last line of {text:?}"))
}

#[test]
fn a_pod_goes_on_from_disk_after_its_daemon_was_replaced() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    skip_if!(harness::disk::tools_missing());
    let mut world = World::new();
    let data = world.scratch().join("data");
    fs::create_dir(&data).unwrap();
    let file = data.join("count");
    let counted = || last(&fs::read_to_string(&file).unwrap_or_default());
    let volume = format!("{}:/data", data.display());
    let image = harness::disk::ext4(&world.scratch().join("disk.ext4"), 16, None);
    let disk = format!("{image}:/disk");
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "counter", "--volume", &volume, "--disk", &disk,
        "--rootfs", &rootfs, "--", "/bin/sh", "-c", COUNT,
    ]);
    run.expect_code(0);
    let reaches = |count| eventually("the counter", SLOW, || (counted() >= count).then_some(()));
    reaches(2);
    // A clock that stood still as long as the pod, or longer, is never that right again.
    let clock = data.join("clock");
    let knows_the_time = |stood_still: Duration| {
        let right = || clock_error(&clock).filter(|error| *error < stood_still);
        eventually("the right time in the guest", SLOW, right);
    };

    // In memory.
    world.ctl.run(["pause", "counter"]).expect_code(0);
    let (paused_at, since) = (counted(), Instant::now());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(counted(), paused_at, "it counted while it was paused");
    let stood_still = since.elapsed();
    world.ctl.run(["resume", "counter"]).expect_code(0);
    reaches(paused_at + 2);
    knows_the_time(stood_still);

    // On disk, the pod going on.
    let copy = world.scratch().join("copy");
    let copy = copy.to_str().unwrap();
    let snapshot = world
        .ctl
        .run(["snapshot", "--keep-running", "--to", copy, "counter"]);
    snapshot.expect_code(0);
    let kept_at = counted();
    reaches(kept_at + 1);
    // A folder that is not empty is refused, and the pod goes on all the same.
    let again = world.ctl.run(["snapshot", "--to", copy, "counter"]);
    again.expect_code(125);
    assert!(again.stderr.contains("empty folder"), "{again:?}");
    let refused_at = counted();
    reaches(refused_at + 1);

    // On disk, and the daemon gone.
    world.ctl.run(["snapshot", "counter"]).expect_code(0);
    let (saved_at, since) = (counted(), Instant::now());
    world.assert_nothing_left();
    world.daemon.terminate();
    world.daemon.start_again();
    std::thread::sleep(Duration::from_secs(3));
    let stood_still = since.elapsed();
    world.ctl.run(["restore", "counter"]).expect_code(0);
    reaches(saved_at + 2);
    knows_the_time(stood_still);
    let text = fs::read_to_string(&file).unwrap();
    let numbers: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(
        numbers.iter().copied().eq(1..=last(&text)),
        "no number is missing and none comes twice: {numbers:?}"
    );

    // On disk as what differs from the first copy, and back from there.
    let diff = world.scratch().join("diff");
    let to = diff.to_str().unwrap();
    let snapshot = world
        .ctl
        .run(["snapshot", "--base", copy, "--to", to, "counter"]);
    snapshot.expect_code(0);
    let differs_at = counted();
    assert!(disk_bytes(&diff) < disk_bytes(Path::new(copy)) / 2);
    world
        .ctl
        .run(["restore", "--from", to, "counter"])
        .expect_code(0);
    reaches(differs_at + 1);

    // The pod is whole: exec, logs, and the end.
    let exec = world.ctl.run([
        "exec",
        "counter",
        "--",
        "/bin/cat",
        "/data/count",
        "/disk/count",
    ]);
    assert!(last(&exec.expect_code(0).stdout) > saved_at);
    let logs = world.ctl.run(["logs", "counter"]);
    assert!(last(&logs.expect_code(0).stdout) > saved_at, "{logs:?}");
    world
        .ctl
        .run(["stop", "--time", "1s", "counter"])
        .expect_code(0);
    world.ctl.run(["rm", "counter"]).expect_code(0);
}
