//! What happens to the node.

use harness::cri::v1;
use harness::eventually;
use harness::kubelet::SOON;
use nix::sys::signal::Signal;

use crate::{Backend, Mode, Outcome, Suite, skip};

pub(super) fn pause(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let config = suite.container("paused", "while :; do echo tick; sleep 1; done");
    let name = config.metadata.clone().unwrap().name;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "tick");
    suite.with_node(|node| {
        node.containerd.ctr(&["tasks", "pause", &id]);
        let listed = node.containerd.ctr(&["tasks", "list"]);
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let line = listed.lines().find(|line| line.starts_with(&id)).unwrap();
        assert!(line.contains("PAUSED"), "{line}");
        node.containerd.ctr(&["tasks", "resume", &id]);
    })?;
    let lines = kubelet.log(&name).lines().count();
    eventually("more output", SOON, || {
        (kubelet.log(&name).lines().count() > lines).then_some(())
    });
    kubelet.stop_container(&id, 0);
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn containerd_restart(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let config = suite.container(
        "survivor",
        "trap 'exit 6' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 1; done",
    );
    let name = config.metadata.clone().unwrap().name;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "line 1");
    suite.with_node(|node| node.containerd.restart(Signal::SIGKILL))?;
    let pod = suite.pod().id;
    eventually("CRI after the restart", SOON, || {
        kubelet.try_pod_status(&pod).ok()
    });
    assert_eq!(kubelet.pod_state(&pod), v1::PodSandboxState::SandboxReady);
    let status = kubelet.status(&id);
    assert_eq!(status.state(), v1::ContainerState::ContainerRunning);
    let lines = kubelet.log(&name).lines().count();
    eventually("more output", SOON, || {
        (kubelet.log(&name).lines().count() > lines).then_some(())
    });
    assert_eq!(kubelet.output(&id, "echo still here"), "still here\n");
    kubelet.stop_container(&id, 60);
    assert_eq!(kubelet.exited(&id).exit_code, 6);
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn guest_panic(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let pod = suite.privileged_pod("panics");
    let mut config = suite.container("panics", "echo b > /proc/sysrq-trigger; sleep 1000");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let id = pod.run_of(config);
    assert_ne!(kubelet.exited(&id).exit_code, 0);
    eventually("the pod's end", SOON, || {
        let state = kubelet.pod_state(&pod.id);
        (state == v1::PodSandboxState::SandboxNotready).then_some(())
    });
    kubelet.remove_pod(&pod.id);
    Ok(())
}

/// containerd hears of a broken connection, and has the kubelet restart the containers: in the
/// pod as it is, with its network and what its volumes in memory hold.
pub(super) fn daemon_restart(suite: &Suite) -> Outcome {
    if suite.backend != Some(Backend::Qemu) {
        return skip("pods are threads of the daemon and end with it, by design; see row 53");
    }
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    let keep = suite.container("keeps", "echo kept > /dev/shm/note");
    let _ = suite.output_of(keep);
    suite.with_node(|node| node.world.daemon.kill_and_restart())?;
    let pod = suite.pod().id;
    assert_eq!(kubelet.pod_state(&pod), v1::PodSandboxState::SandboxReady);
    let config = suite.container(
        "again",
        "trap 'exit 6' TERM; cat /dev/shm/note; while :; do sleep 1; done",
    );
    let name = config.metadata.clone().unwrap().name;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "kept");
    assert_eq!(kubelet.output(&id, "echo still here"), "still here\n");
    kubelet.stop_container(&id, 60);
    assert_eq!(kubelet.exited(&id).exit_code, 6);
    kubelet.remove_container(&id);
    if suite.mode != Some(Mode::Proxy) {
        // Behind a shim containerd has not even noticed: its waiting call is asked again.
        assert_eq!(kubelet.output(&shell, "echo never gone"), "never gone\n");
        kubelet.stop_container(&shell, 0);
        assert_eq!(kubelet.exited(&shell).exit_code, 137);
    }
    // As the kubelet does first. It ends what containerd has lost sight of.
    kubelet.stop_pod(&pod);
    suite.renew();
    count_anew(suite)
}

/// Another daemon holds other things before its first pod.
fn count_anew(suite: &Suite) -> Outcome {
    suite.with_node(|node| {
        node.world.before = harness::leftovers::Held::by(&node.world.daemon);
    })
}

pub(super) fn stale_state(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    suite.with_node(|_| ())?;
    suite.renew();
    let pod = suite.pod().id;
    let shell = suite.shell();
    let folder = suite.with_node(|node| {
        node.world.daemon.kill();
        // As after a reboot of the node; VMs that are processes outlive the daemon.
        node.world.daemon.end_vms();
        node.world.daemon.start_again();
        node.world.daemon.state_dir().join(&pod)
    })?;
    eventually("the pod's end", SOON, || {
        let state = kubelet.pod_state(&pod);
        (state == v1::PodSandboxState::SandboxNotready).then_some(())
    });
    let _ended = kubelet.exited(&shell);
    kubelet.stop_pod(&pod);
    suite.renew();
    assert!(!folder.exists(), "{} remains", folder.display());
    // containerd keeps the bundles of tasks that it lost sight of until it starts anew.
    suite.with_node(|node| node.containerd.restart(Signal::SIGTERM))?;
    count_anew(suite)?;
    let next = suite.pod().id;
    assert_eq!(kubelet.pod_state(&next), v1::PodSandboxState::SandboxReady);
    Ok(())
}
