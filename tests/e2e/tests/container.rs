//! What a container sees and returns: one pod, many processes.
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use e2e::World;
use harness::pty::OnPty;
use harness::{kvm_missing, skip_if};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

/// A process in an emulated guest kernel starts slowly.
const SLOW: Duration = Duration::from_secs(300);

#[test]
fn one_pod_serves_execs_volumes_and_terminals() {
    skip_if!(kvm_missing());
    let world = World::new();
    let rw = world.scratch().join("rw");
    let ro = world.scratch().join("ro");
    fs::create_dir(&rw).unwrap();
    fs::create_dir(&ro).unwrap();
    fs::set_permissions(&rw, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(ro.join("given"), "from the host").unwrap();
    let rootfs = world.rootfs.to_str().unwrap();
    let (rw_arg, ro_arg) = (
        format!("{}:/data/rw", rw.display()),
        format!("{}:/data/ro:ro", ro.display()),
    );
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "main", "--hostname", "guest-of-test",
        "--env", "FRUIT=apple", "--volume", &rw_arg, "--volume", &ro_arg,
        "--rootfs", rootfs, "--", "/bin/sh", "-c", "echo up; echo trouble >&2; exec sleep 100000",
    ]);
    run.expect_code(0);

    output_and_exit_codes(&world);
    stdin_reaches_its_end(&world);
    environment_user_and_workdir(&world);
    what_cannot_run(&world);
    signals(&world);
    volumes(&world);
    large_file_is_intact(&world);
    terminal(&world);

    let logs = world.ctl.run(["logs", "main"]);
    logs.expect_code(0);
    assert!(logs.stdout.contains("up"), "{logs:?}");
    let ps = world.ctl.run(["ps", "--json"]);
    ps.expect_code(0);
    let pods: serde_json::Value = serde_json::from_str(&ps.stdout).expect("ps --json is JSON");
    assert!(pods.to_string().contains("main"), "{pods}");

    world.ctl.run(["stop", "main"]).expect_code(0);
    world.ctl.run(["rm", "main"]).expect_code(0);
    world.assert_nothing_left();
}

fn exec(world: &World, script: &str) -> harness::ctl::Output {
    world
        .ctl
        .run(["exec", "main", "--", "/bin/sh", "-c", script])
}

fn output_and_exit_codes(world: &World) {
    let both = exec(world, "echo out; echo err >&2; exit 42");
    both.expect_code(42);
    assert_eq!(
        (both.stdout.as_str(), both.stderr.as_str()),
        ("out\n", "err\n")
    );
    let script = "i=0; while [ $i -lt 2000 ]; do echo line-$i; i=$((i+1)); done; exit 255";
    let long = exec(world, script);
    let expected: String = (0..2000).map(|i| format!("line-{i}\n")).collect();
    assert_eq!(long.expect_code(255).stdout, expected);
}

fn stdin_reaches_its_end(world: &World) {
    let input: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let sum = hex(&Sha256::digest(&input));
    let out = world
        .ctl
        .run_with_stdin(["exec", "-i", "main", "--", "/bin/sha256sum"], &input);
    assert!(out.expect_code(0).stdout.starts_with(&sum), "{out:?}");
    // Without -i the process has no input at all.
    let none = world
        .ctl
        .run_with_stdin(["exec", "main", "--", "/bin/wc", "-c"], b"ignored");
    assert_eq!(none.expect_code(0).stdout.trim(), "0");
}

fn environment_user_and_workdir(world: &World) {
    #[rustfmt::skip]
    let set = world.ctl.run([
        "exec", "--env", "TREE=oak", "--user", "demo", "--workdir", "/tmp", "main", "--",
        "/bin/sh", "-c", "echo $TREE $FRUIT; pwd; id -u; id -g; id -G; hostname",
    ]);
    assert_eq!(
        set.expect_code(0).stdout,
        "oak apple\n/tmp\n1000\n1000\n1000 50\nguest-of-test\n"
    );
}

fn what_cannot_run(world: &World) {
    let missing = world
        .ctl
        .run(["exec", "main", "--", "/bin/no-such-program"]);
    missing.expect_code(127);
    assert!(missing.stderr.contains("no-such-program"), "{missing:?}");
    let plain = world.ctl.run(["exec", "main", "--", "/etc/passwd"]);
    plain.expect_code(126);
    assert!(plain.stderr.contains("/etc/passwd"), "{plain:?}");
    let nobody = world.ctl.run(["exec", "no-such-pod", "--", "/bin/true"]);
    nobody.expect_code(125);
    assert!(nobody.stderr.contains("no-such-pod"), "{nobody:?}");
}

fn signals(world: &World) {
    exec(world, "kill -KILL $$").expect_code(137);
    // A signal to the CLI is a signal to the process.
    let child = world
        .ctl
        .spawn(["exec", "main", "--", "/bin/sh", "-c", SIGNAL_SCRIPT]);
    let pid = Pid::from_raw(child.id().cast_signed());
    let ready = world.scratch().join("rw/ready");
    harness::eventually("the script's start", SLOW, || ready.exists().then_some(()));
    kill(pid, Signal::SIGTERM).unwrap();
    let out = world.ctl.finish(child, b"");
    assert_eq!(out.expect_code(9).stdout, "got TERM\n");
    // A deadline ends it.
    let late = world.ctl.run([
        "exec",
        "--timeout",
        "2s",
        "main",
        "--",
        "/bin/sleep",
        "1000",
    ]);
    late.expect_code(124);
}

const SIGNAL_SCRIPT: &str = "trap 'echo got TERM; exit 9' TERM; touch /data/rw/ready; \
                             while true; do sleep 0.2; done";

fn volumes(world: &World) {
    let (rw, ro) = (world.scratch().join("rw"), world.scratch().join("ro"));
    // What the host writes after the pod's start is seen too.
    fs::write(rw.join("later"), "written later").unwrap();
    let seen = exec(
        world,
        "cat /data/ro/given /data/rw/later; echo x > /data/ro/new || echo refused",
    );
    assert_eq!(
        seen.expect_code(0).stdout,
        "from the hostwritten laterrefused\n"
    );
    assert!(!ro.join("new").exists(), "a read-only volume took a write");
    let script = "echo from the guest > /data/rw/back";
    let wrote = world.ctl.run([
        "exec",
        "--user",
        "1000:1000",
        "main",
        "--",
        "/bin/sh",
        "-c",
        script,
    ]);
    wrote.expect_code(0);
    assert_eq!(
        fs::read_to_string(rw.join("back")).unwrap(),
        "from the guest\n"
    );
    assert_eq!(fs::metadata(rw.join("back")).unwrap().uid(), 1000);
}

fn large_file_is_intact(world: &World) {
    // 4 MiB where every guest kernel instruction is emulated, 64 MiB elsewhere; the way back
    // costs more there, and takes a part of it.
    let emulated = world
        .ctl
        .run(["check", "--json"])
        .stdout
        .contains("emulated");
    let size: usize = if emulated { 4 << 20 } else { 64 << 20 };
    let back = if emulated { size / 4 } else { size };
    let data: Vec<u8> = (0..size).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect();
    fs::write(world.scratch().join("rw/large"), &data).unwrap();
    let script = format!("sha256sum /data/rw/large; head -c {back} /data/rw/large > /data/rw/copy");
    let out = exec(world, &script);
    assert!(
        out.expect_code(0)
            .stdout
            .starts_with(&hex(&Sha256::digest(&data))),
        "{out:?}"
    );
    let copy = fs::read(world.scratch().join("rw/copy")).unwrap();
    assert!(
        copy.len() == back && data.starts_with(&copy),
        "the guest's copy of {back} bytes differs"
    );
}

fn terminal(world: &World) {
    let mut pty = OnPty::spawn(
        world.ctl.command(["exec", "-it", "main", "--", "/bin/sh"]),
        30,
        100,
    );
    pty.type_in("tty && stty size\n");
    pty.wait_for("30 100", SLOW);
    assert!(pty.shown.contains("/dev/pts/"), "{}", pty.shown);
    pty.resize(40, 120);
    pty.type_in("until stty size | grep ^40; do sleep 1; done\n");
    pty.wait_for("40 120", SLOW);
    // Ctrl-C goes to the foreground process of the container, not to the CLI; before one runs, the
    // shell may keep it to itself.
    pty.type_in("sh -c 'echo run\"\"ning; exec sleep 1000'\n");
    pty.wait_for("running", SLOW);
    pty.type_in("\x03");
    pty.type_in("echo still-$((40+2))\n");
    pty.wait_for("still-42", SLOW);
    pty.type_in("exit 5\n");
    assert_eq!(pty.finish(SLOW), Some(5), "{}", pty.shown);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
