//! A shell in the guest, beside the containers.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::path::Path;
use std::time::Duration;

use e2e::World;
use harness::pty::OnPty;
use harness::{kvm_missing, skip_if};

/// A process in an emulated guest kernel starts slowly.
const SLOW: Duration = Duration::from_secs(300);

const SHELL: &str = "/bin/busybox";

#[test]
fn the_guest_has_a_shell_when_it_is_asked_for() {
    skip_if!(kvm_missing());
    skip_if!((!Path::new(SHELL).exists()).then(|| format!("there is no {SHELL}")));
    let world = World::with_config(&format!("[vm]\ndebug_console = \"{SHELL}\"\n"));
    let rootfs = world.rootfs.to_str().unwrap();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "pod", "--rootfs", rootfs, "--", "/bin/sleep", "1000000",
    ]);
    run.expect_code(0);

    // The guest's own files and processes: the agent is PID 1.
    let script = b"ls -d /run/kuasar/state; cat /proc/1/comm; tty";
    let piped = world.ctl.run_with_stdin(["debug-console", "pod"], script);
    piped.expect_code(0);
    for part in ["/run/kuasar/state\n", "init\n", "not a tty"] {
        assert!(piped.stdout.contains(part), "{part}: {piped:?}");
    }

    let mut pty = OnPty::spawn(world.ctl.command(["debug-console", "pod"]), 30, 100);
    pty.type_in("tty && stty size\n");
    pty.wait_for("30 100", SLOW);
    // Ctrl-C is the guest's: a signal to the command once one runs; before, the shell's.
    pty.type_in("sh -c 'echo run\"\"ning; exec sleep 1000'\n");
    pty.wait_for("running", SLOW);
    pty.type_in("\x03");
    pty.type_in("echo still-$((40+2))\n");
    pty.wait_for("still-42", SLOW);
    pty.type_in("exit\n");
    assert_eq!(pty.finish(SLOW), Some(0), "{}", pty.shown);

    world.ctl.run(["rm", "--force", "pod"]).expect_code(0);
    world.assert_nothing_left();
}
