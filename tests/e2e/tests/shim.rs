//! Pods through a shim each: containerd 2.1 with `sandboxer = "shim"`, and containerd 1.7.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::Path;

use harness::containerd::{Line, Mode, Options, Shim};
use harness::cri::v1;
use harness::leftovers::Held;
use harness::{eventually, kvm_missing, skip_if};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use e2e::node::{Node, SOON};

/// Memory of a shim at rest, in KiB: what it has to itself and its part of what it shares. Code
/// that is not optimised takes several times as much.
const MAX_PSS_KIB: u64 = if cfg!(debug_assertions) {
    8 << 10
} else {
    3 << 10
};

#[test]
fn containerd_2_runs_pods_through_shims() {
    skip_if!(kvm_missing());
    skip_if!(Line::V2.missing());
    life_of_pods(Line::V2);
}

#[test]
fn containerd_1_7_runs_pods_through_shims() {
    skip_if!(kvm_missing());
    skip_if!(Line::V1_7.missing());
    life_of_pods(Line::V1_7);
}

fn options(line: Line) -> Options {
    Options {
        line,
        mode: Mode::Shim,
        ..Options::default()
    }
}

fn life_of_pods(line: Line) {
    let mut node = Node::new(&options(line));
    let pod = node.run_pod("first");
    let shims = node.containerd.shims();
    assert_eq!(shims.len(), 1, "one for the pod: {shims:?}");

    let script = "trap 'echo got TERM; exit 3' TERM; echo $FROM_IMAGE $GIVEN $(hostname); \
                  while :; do sleep 1; done";
    let main = pod.run("main", script);
    eventually("the container's output", SOON, || {
        node.log("main")
            .contains(" stdout F yes too first\n")
            .then_some(())
    });
    let (stdout, stderr, code) = node.exec(&main, "cat /etc/hostname /etc/resolv.conf; exit 9");
    assert_eq!(
        (stdout.as_str(), code),
        ("first\nsearch svc.local\nnameserver 10.96.0.10\n", 9),
        "{stderr}"
    );
    let side = pod.run("side", "test -f /etc/hosts && exit 4");
    assert_eq!(node.exited(&side).exit_code, 4);
    node.remove_container(&side);
    assert_eq!(node.containerd.shims(), shims, "containers need none");
    assert_small(&shims[0]);

    // Not asked politely: the shim stays, and the next containerd finds it.
    let (id, container) = (pod.id.clone(), main.clone());
    node.containerd.restart(Signal::SIGKILL);
    assert_eq!(node.containerd.shims(), shims);
    assert_eq!(node.pod_state(&id), v1::PodSandboxState::SandboxReady);
    let (stdout, _, code) = node.exec(&container, "echo still here");
    assert_eq!((stdout.as_str(), code), ("still here\n", 0));

    node.stop_container(&container, 60);
    assert_eq!(node.exited(&container).exit_code, 3);
    assert!(node.log("main").contains(" stdout F got TERM\n"));
    node.remove_container(&container);
    node.stop_pod(&id);
    assert_eq!(node.pod_state(&id), v1::PodSandboxState::SandboxNotready);
    node.stop_pod(&id);
    node.remove_pod(&id);
    node.remove_pod(&id);
    assert_gone(&shims);

    // A shim that is killed: containerd has the program clean up, and the pod is over.
    let pod = node.run_pod("second");
    let shims = node.containerd.shims();
    let (id, container) = (pod.id.clone(), pod.run("main", "sleep 1000"));
    let pid = Pid::from_raw(shims[0].pid.cast_signed());
    kill(pid, Signal::SIGKILL).unwrap();
    eventually("the end of its container", SOON, || {
        let status = node.status(&container);
        (status.state() == v1::ContainerState::ContainerExited).then_some(())
    });
    eventually("the pod's end in the daemon", SOON, || {
        let folder = node.world.daemon.state_dir().join(&id);
        (!folder.exists()).then_some(())
    });
    node.remove_pod(&id);
    assert_gone(&shims);

    // Without a daemon: said, and no shim stays.
    node.world.daemon.terminate();
    let why = node.try_run_pod(node.pod_config("third")).unwrap_err();
    assert!(
        why.message().contains("cannot reach vmm-sandboxer"),
        "{why}"
    );
    eventually("the end of its shim", SOON, || {
        node.containerd.shims().is_empty().then_some(())
    });
    node.world.daemon.start_again();
    node.world.before = Held::by(&node.world.daemon);
    let id = node.run_pod("fourth").id;
    node.remove_pod(&id);
    node.assert_nothing_left();
}

/// What a pod costs besides its VM.
fn assert_small(shim: &Shim) {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", shim.pid)).unwrap();
    let kib = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap();
    eprintln!("the shim's PSS: {kib} KiB");
    assert!(kib <= MAX_PSS_KIB, "{kib} KiB");
    let threads = fs::read_dir(format!("/proc/{}/task", shim.pid)).unwrap();
    assert_eq!(threads.count(), 1);
}

fn assert_gone(shims: &[Shim]) {
    for shim in shims {
        eventually("the shim's end", SOON, || {
            let proc = format!("/proc/{}", shim.pid);
            (!Path::new(&proc).exists() && !shim.socket.exists()).then_some(())
        });
    }
}
