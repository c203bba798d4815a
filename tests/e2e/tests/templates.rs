//! Pods as clones of a template.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use e2e::World;
use harness::leftovers::Held;
use harness::{eventually, kvm_missing, not_in_process, skip_if};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A guest boots slowly where its kernel is emulated.
const SLOW: Duration = Duration::from_secs(300);

/// What must be different in every pod, a line each, then the clock.
const IDENTITY: &str = "hostname; cat /proc/sys/kernel/random/boot_id; \
                        head -c 16 /dev/urandom | od -An -tx1; \
                        cat /proc/sys/kernel/random/uuid; date +%s";

/// Names of the phases of a pod's start.
fn phases(world: &World, pod: &str) -> Vec<String> {
    let shown = world.ctl.run(["inspect", "--json", pod]);
    let shown: Value = serde_json::from_str(&shown.expect_code(0).stdout).unwrap();
    let phases = shown.pointer("/status/vm/phases").unwrap();
    let names = phases.as_array().unwrap().iter();
    names
        .map(|phase| phase["name"].as_str().unwrap().to_owned())
        .collect()
}

/// Starts a pod; returns its id.
fn detached(world: &World, name: &str) -> String {
    let rootfs = world.rootfs.to_str().unwrap();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", name, "--rootfs", rootfs, "--", "/bin/sleep", "100000",
    ]);
    run.expect_code(0).stdout.trim().to_owned()
}

fn lives_and_goes(world: &World, name: &str) {
    let alive = world.ctl.run(["exec", name, "--", "/bin/echo", "alive"]);
    assert_eq!(alive.expect_code(0).stdout, "alive\n");
    world.ctl.run(["rm", "--force", name]).expect_code(0);
}

/// Folders of the daemon's pods.
fn pods(world: &World) -> Vec<fs::DirEntry> {
    let entries = fs::read_dir(world.daemon.state_dir()).unwrap().flatten();
    entries.filter(|entry| entry.path().is_dir()).collect()
}

#[test]
fn every_clone_is_someone_else() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let world = World::with_config("[templates]\nwarm = 1\nshells = 0\n");
    let mut seen = BTreeSet::new();
    // The first finds none that waits, and has one made for the next.
    for (name, phase) in [("first", "state restored"), ("second", "adopted")] {
        if phase == "adopted" {
            eventually("a clone that waits", SLOW, || one_waits(&world));
        }
        is_someone_else(&world, name, phase, &mut seen);
    }
    // One of them ends; the other does not notice.
    world.ctl.run(["rm", "--force", "first"]).expect_code(0);
    lives_and_goes(&world, "second");
    let held = Held::by(&world.daemon).vm_threads;
    let mut vcpus = held.iter().filter(|name| name.starts_with("vcpu"));
    assert!(vcpus.all(|name| name.ends_with("-warm")), "{held:?}");
    assert!(pods(&world).is_empty(), "{:?}", pods(&world));
}

/// A clone waits for a pod.
fn one_waits(world: &World) -> Option<()> {
    world
        .daemon
        .log()
        .contains("a warm clone waits")
        .then_some(())
}

/// Runs a pod that reaches `phase` when it starts, and shares nothing with those `seen`.
fn is_someone_else(world: &World, name: &str, phase: &str, seen: &mut BTreeSet<String>) {
    let pod = detached(world, name);
    let reached = phases(world, name);
    assert!(reached.iter().any(|p| p == phase), "{reached:?}");
    let threads = Held::by(&world.daemon).vm_threads;
    let role = format!("vcpu0-{pod}");
    let named = threads.iter().any(|thread| role.starts_with(thread));
    assert!(named, "{threads:?}");
    let folder = world.daemon.state_dir().join(pod);
    assert!(folder.join("console.log").exists());
    assert!(folder.join("vsock.sock").exists());
    let id = world
        .ctl
        .run(["exec", name, "--", "/bin/sh", "-c", IDENTITY]);
    let text = id.expect_code(0).stdout.clone();
    let lines: Vec<_> = text.lines().collect();
    let (clock, own) = lines.split_last().unwrap();
    assert_eq!(own.len(), 4, "{text}");
    for line in own {
        assert!(seen.insert((*line).to_owned()), "{line} twice: {seen:?}");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let guest: u64 = clock.parse().unwrap();
    let apart = now.as_secs().abs_diff(guest);
    assert!(apart < 60, "the guest's clock is {apart} s off");
}

/// Sets or lifts the daemon's limit of address space, in bytes.
fn limit_memory(world: &World, bytes: Option<u64>) -> bool {
    let limit = bytes.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
    let pid = world.daemon.pid().to_string();
    let status = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--as={limit}:unlimited")])
        .status();
    status.is_ok_and(|status| status.success())
}

fn address_space(world: &World) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/statm", world.daemon.pid())).unwrap();
    let pages: u64 = text.split(' ').next().unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn a_pod_without_memory_for_it_fails_alone() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let mut world = World::new();
    detached(&world, "witness");
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    let run = |world: &World| {
        world
            .ctl
            .run(["run", "--rootfs", &rootfs, "--", "/bin/true"])
    };
    // Room for everything but a guest's memory.
    let room = address_space(&world) + (64 << 20);
    if !limit_memory(&world, Some(room)) {
        eprintln!("skipped: the daemon's memory cannot be limited with prlimit");
        return;
    }
    let refused = run(&world);
    refused.expect_code(125);
    assert!(refused.stderr.contains("guest memory"), "{refused:?}");
    let alive = world
        .ctl
        .run(["exec", "witness", "--", "/bin/echo", "alive"]);
    assert_eq!(alive.expect_code(0).stdout, "alive\n");
    assert!(limit_memory(&world, None));
    run(&world).expect_code(0);
    world.ctl.run(["rm", "--force", "witness"]).expect_code(0);
    world.assert_nothing_left();
    assert!(world.daemon.is_running());
}

/// A template that cannot be kept is still used, by pods of this daemon.
#[test]
fn a_full_disk_costs_the_next_daemon_a_boot_and_nobody_else_anything() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let disk = tempfile::tempdir().unwrap();
    let size = Some("size=1m");
    let flags = MsFlags::empty();
    if let Err(err) = mount(Some("tmpfs"), disk.path(), Some("tmpfs"), flags, size) {
        eprintln!("skipped: cannot mount a small file system: {err}");
        return;
    }
    let _unmount = Unmount(disk.path());
    let world = World::with_config(&format!(
        "[templates]\nwarm = 0\nshells = 0\ndir = {:?}\n",
        disk.path().to_str().unwrap()
    ));
    detached(&world, "builder");
    let log = world.daemon.log();
    assert!(
        log.contains("not kept for the next daemon"),
        "the log says so: {log}"
    );
    detached(&world, "clone");
    let cloned = phases(&world, "clone");
    assert!(cloned.iter().any(|p| p == "state restored"), "{cloned:?}");
    assert_eq!(
        fs::read_dir(disk.path()).unwrap().count(),
        0,
        "half a template"
    );
    for name in ["builder", "clone"] {
        lives_and_goes(&world, name);
    }
    world.assert_nothing_left();
}

#[test]
fn a_daemon_killed_while_it_builds_leaves_nothing_to_the_next() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let templates = tempfile::tempdir().unwrap();
    let config = format!(
        "[templates]\nwarm = 1\ndir = {:?}\n",
        templates.path().to_str().unwrap()
    );
    let doomed = World::with_config(&config);
    let rootfs = doomed.rootfs.to_str().unwrap();
    let mut client = doomed
        .ctl
        .spawn(["run", "--rootfs", rootfs, "--", "/bin/true"]);
    let building = || fs::read_dir(templates.path()).unwrap().flatten().next();
    eventually("the build", SLOW, building);
    kill(
        Pid::from_raw(doomed.daemon.pid().cast_signed()),
        Signal::SIGKILL,
    )
    .unwrap();
    let status = eventually("the client's end", SLOW, || client.try_wait().unwrap());
    assert!(!status.success());
    let left = building().unwrap().file_name();
    let left = left.to_str().unwrap();
    assert!(left.starts_with(".building-"), "{left}");
    drop(doomed);

    let next = World::with_config(&config);
    assert!(building().is_none(), "{:?}", building());
    drop(next);
}

#[test]
fn templates_are_listed_verified_and_removed() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let world = World::new();
    // One that exists: the tests before this one cloned it, or it is built now.
    let built = world.ctl.run(["template", "build", "--json"]);
    let built: Value = serde_json::from_str(&built.expect_code(0).stdout).unwrap();
    let key = built["key"].as_str().unwrap().to_owned();
    assert!(built["disk_bytes"].as_u64().unwrap() > 1 << 20, "{built}");
    let folder = guest_image::Cache::locate()
        .unwrap()
        .root()
        .join("templates");

    // A copy of it, to be damaged.
    let copies = tempfile::tempdir().unwrap();
    let copy = copies.path().join(&key);
    fs::create_dir(&copy).unwrap();
    for file in fs::read_dir(folder.join(&key)).unwrap().flatten() {
        fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    let config = world.scratch().join("copies.toml");
    let text = format!(
        "[templates]\nwarm = 0\ndir = {:?}\n",
        copies.path().to_str().unwrap()
    );
    fs::write(&config, &text).unwrap();
    let template = |args: &[&str]| {
        let config = config.to_str().unwrap();
        let args = ["template", "--config", config]
            .into_iter()
            .chain(args.iter().copied());
        world.ctl.run(args)
    };
    let listed = template(&["ls"]);
    assert!(listed.expect_code(0).stdout.contains(&key), "{listed:?}");
    template(&["verify"]).expect_code(0);
    clones_outlive_the_file(&text, &copy);
    damage(&copy.join("memory"));
    let bad = template(&["verify", "--json"]);
    let bad: Value = serde_json::from_str(&bad.expect_code(1).stdout).unwrap();
    assert_eq!(bad[0]["ok"], false);
    assert!(
        bad[0]["error"].as_str().unwrap().contains("digest"),
        "{bad}"
    );
    template(&["rm", "no-such-key"]).expect_code(125);
    template(&["rm", &key[..8]]).expect_code(0);
    assert_eq!(fs::read_dir(copies.path()).unwrap().count(), 0);
}

/// The file of a template goes away while clones of it run, then the daemon amid a clone.
fn clones_outlive_the_file(config: &str, template: &Path) {
    let mut world = World::with_config(config);
    detached(&world, "before");
    let away = template.with_file_name("away");
    fs::rename(template, &away).unwrap();
    detached(&world, "after");
    for name in ["before", "after"] {
        let cloned = phases(&world, name);
        assert!(cloned.iter().any(|p| p == "state restored"), "{cloned:?}");
        lives_and_goes(&world, name);
    }
    fs::rename(&away, template).unwrap();

    let rootfs = world.rootfs.to_str().unwrap();
    let mut client = world
        .ctl
        .spawn(["run", "--rootfs", rootfs, "--", "/bin/true"]);
    eventually("the clone", SLOW, || pods(&world).pop());
    world.daemon.kill_and_restart();
    let status = eventually("the client's end", SLOW, || client.try_wait().unwrap());
    assert!(!status.success());
    detached(&world, "next");
    world.ctl.run(["rm", "--force", "next"]).expect_code(0);
    let left = pods(&world);
    assert!(left.is_empty(), "{left:?}");
}

/// Flips a bit in the middle of the file's data.
fn damage(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 16 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 16 << 20).unwrap();
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
