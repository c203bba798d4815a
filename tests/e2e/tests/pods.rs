//! Pods as a whole: foreground runs, deadlines, guest failures, the embedded daemon.
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use e2e::World;
use harness::{kvm_missing, program, skip_if};

#[test]
fn a_foreground_run_passes_everything_through_and_leaves_nothing() {
    skip_if!(kvm_missing());
    let world = World::new();
    let rootfs = world.rootfs.to_str().unwrap();
    #[rustfmt::skip]
    let run = world.ctl.run_with_stdin([
        "run", "-i", "--memory", "192MiB", "--env", "A=1", "--workdir", "/tmp",
        "--user", "demo", "--hostname", "short", "--rootfs", rootfs, "--",
        "/bin/sh", "-c", "read line; echo $line $A $(pwd) $(id -u) $(hostname); echo bad >&2; exit 7",
    ], b"typed\n");
    run.expect_code(7);
    assert_eq!(run.stdout, "typed 1 /tmp 1000 short\n");
    assert!(run.stderr.contains("bad"), "{run:?}");
    world.assert_nothing_left();

    // The command is missing: the pod is undone, and the code is the shell's.
    let missing = world
        .ctl
        .run(["run", "--rootfs", rootfs, "--", "/no/such/program"]);
    missing.expect_code(127);
    world.assert_nothing_left();
}

#[test]
fn a_deadline_ends_the_pod() {
    skip_if!(kvm_missing());
    let world = World::new();
    let rootfs = world.rootfs.to_str().unwrap();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--timeout", "3s", "--rootfs", rootfs, "--", "/bin/sh", "-c", "echo begun; sleep 1000",
    ]);
    run.expect_code(124);
    assert_eq!(run.stdout, "begun\n");
    world.assert_nothing_left();
}

#[test]
fn a_guest_kernel_panic_ends_that_pod_only() {
    skip_if!(kvm_missing());
    let mut world = World::new();
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    let start = |name: &'static str| {
        let rootfs = rootfs.clone();
        let ctl = world.ctl.clone();
        #[rustfmt::skip]
        let spawned = std::thread::spawn(move || ctl.run([
            "run", "--detach", "--privileged", "--name", name, "--rootfs", &rootfs, "--",
            "/bin/sleep", "100000",
        ]));
        spawned
    };
    let (doomed, witness) = (start("doomed"), start("witness"));
    doomed.join().unwrap().expect_code(0);
    witness.join().unwrap().expect_code(0);

    // Off unless the configuration has it.
    let console = world.ctl.run(["debug-console", "witness"]);
    console.expect_code(125);
    assert!(console.stderr.contains("vm.debug_console"), "{console:?}");

    // The exec dies with its guest: an error of ours, not an exit code of the process.
    let crash = world.ctl.run([
        "exec",
        "doomed",
        "--",
        "/bin/sh",
        "-c",
        "echo c > /proc/sysrq-trigger",
    ]);
    assert_ne!(crash.code, Some(0), "{crash:?}");
    let state = world.ctl.run(["inspect", "--json", "doomed"]);
    state.expect_code(0);
    assert!(
        state.stdout.contains("SANDBOX_NOTREADY"),
        "{}",
        state.stdout
    );
    assert!(
        state.stdout.contains("panic"),
        "the reason is named: {}",
        state.stdout
    );

    let alive = world
        .ctl
        .run(["exec", "witness", "--", "/bin/echo", "still here"]);
    assert_eq!(alive.expect_code(0).stdout, "still here\n");
    assert!(world.daemon.is_running());

    world.ctl.run(["rm", "--force", "doomed"]).expect_code(0);
    world.ctl.run(["rm", "--force", "witness"]).expect_code(0);
    world.assert_nothing_left();
}

#[test]
fn without_a_daemon_the_cli_brings_its_own() {
    skip_if!(kvm_missing());
    let scratch = tempfile::tempdir().unwrap();
    let rootfs = harness::rootfs::busybox(scratch.path());
    let out = program("kuasar-ctl")
        .arg("--address")
        .arg(scratch.path().join("nobody-listens.sock"))
        .args(["run", "--rootfs"])
        .arg(&rootfs)
        .args(["--", "/bin/echo", "embedded"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "embedded\n");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains("kuasar-ctl"),
        "a mount of the run remains: {mounts}"
    );
}
