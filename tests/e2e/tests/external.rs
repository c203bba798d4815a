//! What only pods of an external hypervisor do: they outlive their daemon.
//!
//! Runs in QEMU, unless `BACKEND` names another external hypervisor.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::World;
use harness::{QEMU, clock_error, eventually, external_backend, kvm_missing, skip_if};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A guest's kernel is emulated on some hosts.
const SLOW: Duration = Duration::from_secs(300);

/// QEMU translates, so that the test is the same on every host.
const CONFIG: &str = "[sandbox]\nmode = \"external\"\n[vm]\nmax_memory = \"512MiB\"\n\
                      [hypervisor.qemu]\naccel = \"tcg\"\n";

/// One that hangs is given up soon, however slow the host.
const QUICK_STOP: &str = "[timeouts]\nboot = \"10m\"\nagent_call = \"5m\"\nconnect = \"1m\"\n\
                          stop = \"1s\"\nslow_host_factor = 1\n";

fn hypervisor() -> String {
    external_backend().unwrap_or_else(|| "qemu".to_owned())
}

fn hypervisor_missing() -> Option<String> {
    if external_backend().is_some() {
        return kvm_missing();
    }
    (!Path::new(QEMU).exists()).then(|| format!("there is no {QEMU}"))
}

fn world(more: &str) -> World {
    World::with_config(&format!("{CONFIG}{more}"))
}

/// Starts a pod that counts into a file of the host, and writes the time into one before that.
fn counter(world: &World, name: &str) -> std::path::PathBuf {
    let data = world.scratch().join(name);
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", name, "--volume", &volume, "--rootfs", &rootfs, "--",
        "/bin/sh", "-c",
        "n=0; while :; do n=$((n+1)); echo $n; echo $EPOCHREALTIME > /data/clock; \
         echo $n > /data/count; sleep 0.2; done",
    ]);
    run.expect_code(0);
    data.join("count")
}

fn count(file: &Path) -> u32 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn reaches(file: &Path, least: u32) {
    eventually("the counter", SLOW, || (count(file) >= least).then_some(()));
}

fn inspect(world: &World, name: &str) -> Value {
    let shown = world.ctl.run(["inspect", "--json", name]);
    serde_json::from_str(&shown.expect_code(0).stdout).unwrap()
}

fn vmm_of(world: &World, name: &str) -> i32 {
    let id = inspect(world, name)["pod"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let text = fs::read_to_string(world.daemon.state_dir().join(id).join("vmm.json")).unwrap();
    let processes: Value = serde_json::from_str(&text).unwrap();
    i32::try_from(processes["vmm"]["pid"].as_i64().unwrap()).unwrap()
}

#[test]
fn a_vmm_that_dies_or_hangs_takes_only_its_pod() {
    skip_if!(hypervisor_missing());
    let world = world(QUICK_STOP);
    let killed = counter(&world, "killed");
    let hung = counter(&world, "hung");
    reaches(&killed, 1);
    reaches(&hung, 1);

    // Standing still, and going on, at the right time.
    world.ctl.run(["pause", "hung"]).expect_code(0);
    let (paused_at, since) = (count(&hung), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(count(&hung), paused_at);
    let stood_still = since.elapsed();
    world.ctl.run(["resume", "hung"]).expect_code(0);
    reaches(&hung, paused_at + 2);
    let clock = hung.with_file_name("clock");
    eventually("the right time in the guest", SLOW, || {
        clock_error(&clock).filter(|error| *error < stood_still)
    });
    // What the backend cannot do is said.
    let to = world.scratch().join("snapshot");
    let snapshot = world
        .ctl
        .run(["snapshot", "--to", to.to_str().unwrap(), "hung"]);
    snapshot.expect_code(125);
    let why = format!("{} cannot write a VM to disk", hypervisor());
    assert!(snapshot.stderr.contains(&why), "{snapshot:?}");

    let signal = |name, signal| kill(Pid::from_raw(vmm_of(&world, name)), signal).unwrap();
    signal("killed", Signal::SIGKILL);
    let reason = eventually("the end of the pod", SLOW, || {
        let status = inspect(&world, "killed")["status"].clone();
        let ended = status["processStatus"] == "not ready";
        ended.then(|| status["reason"].as_str().unwrap_or_default().to_owned())
    });
    assert!(reason.contains("killed by signal 9"), "{reason}");

    // The other one has not noticed; hung, it can be removed all the same.
    reaches(&hung, count(&hung) + 2);
    let vmm = vmm_of(&world, "hung");
    signal("hung", Signal::SIGSTOP);
    world.ctl.run(["rm", "--force", "hung"]).expect_code(0);
    assert!(!Path::new(&format!("/proc/{vmm}")).exists());
    world.ctl.run(["rm", "--force", "killed"]).expect_code(0);
    world.assert_nothing_left();
}

#[test]
fn pods_outlive_their_daemon() {
    skip_if!(hypervisor_missing());
    let mut world = world("");
    let file = counter(&world, "lives");
    let ends = counter(&world, "ends");
    reaches(&file, 3);
    reaches(&ends, 1);
    let vmm = vmm_of(&world, "lives");

    // Once asked to end, once killed.
    for killed in [false, true] {
        if killed {
            world.daemon.kill_and_restart();
        } else {
            // One pod ends while nobody looks.
            let doomed = vmm_of(&world, "ends");
            world.daemon.terminate();
            kill(Pid::from_raw(doomed), Signal::SIGKILL).unwrap();
            reaches(&file, count(&file) + 3);
            world.daemon.start_again();
        }
        let before = count(&file);
        reaches(&file, before + 3);
        assert_eq!(vmm_of(&world, "lives"), vmm, "it is the same VM");
        let exec = world
            .ctl
            .run(["exec", "lives", "--", "/bin/cat", "/data/count"]);
        let seen: u32 = exec.expect_code(0).stdout.trim().parse().unwrap();
        assert!(seen >= before);
        // Its output goes on as well.
        let logged = || {
            let logs = world.ctl.run(["logs", "lives"]);
            let text = logs.expect_code(0).stdout.clone();
            text.lines()
                .last()
                .and_then(|line| line.parse().ok())
                .unwrap_or(0)
        };
        eventually("output", SLOW, || (logged() > before).then_some(()));
    }
    world.ctl.run(["rm", "--force", "ends"]);
    world
        .ctl
        .run(["stop", "--time", "1s", "lives"])
        .expect_code(0);
    world.ctl.run(["rm", "lives"]).expect_code(0);
    assert!(!Path::new(&format!("/proc/{vmm}")).exists());
    world.assert_nothing_left();
}
