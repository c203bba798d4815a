//! containerd with our daemon as its sandboxer, used through CRI as the kubelet uses it.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use harness::cgroup::PodCgroup;
use harness::containerd::{HANDLER, Options, containerd_missing};
use harness::cri::v1;
use harness::{eventually, kvm_missing, skip_if};
use nix::sys::signal::Signal;

use e2e::node::{Node, SOON};

#[test]
fn streams_take_the_place_of_fifos() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let node = Node::new(&Options {
        io_type: "streaming",
        ..Options::default()
    });
    let cri = &node.containerd.cri;
    let pod = node.run_pod("first");

    let listed = node.pods();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(listed[0].labels["app"], "first");
    assert!(listed[0].created_at > 0);
    let verbose = cri
        .pod_sandbox_status(v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        })
        .unwrap();
    assert!(verbose.info["info"].contains("in-process"), "{verbose:?}");
    let network = verbose.status.unwrap().network.unwrap();
    assert!(network.ip.starts_with("10.213.7."), "{network:?}");

    // Output of both streams lands in the log that CRI writes.
    let main = pod.run(
        "main",
        "trap 'echo got TERM; exit 3' TERM; echo $FROM_IMAGE $GIVEN $(hostname); \
         echo oops >&2; while :; do sleep 1; done",
    );
    assert_eq!(
        node.status(&main).state(),
        v1::ContainerState::ContainerRunning
    );
    let log = eventually("the container's output", SOON, || {
        let log = node.log("main");
        (log.lines().count() >= 2).then_some(log)
    });
    assert!(log.contains(" stdout F yes too first\n"), "{log}");
    assert!(log.contains(" stderr F oops\n"), "{log}");

    let (stdout, stderr, code) = node.exec(
        &main,
        "cat /etc/resolv.conf /etc/hostname; echo bad >&2; exit 9",
    );
    assert_eq!(
        stdout, "search svc.local\nnameserver 10.96.0.10\nfirst\n",
        "what the pod asked for is in its files"
    );
    assert_eq!((stderr.as_str(), code), ("bad\n", 9));

    // A second container shares the guest, and has files and processes of its own.
    let side = pod.run("side", "hostname; seq 1 3000; exit 4");
    let ended = node.exited(&side);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (4, "Error"));
    assert!(ended.finished_at >= ended.started_at && ended.started_at > 0);
    let log = node.log("side");
    assert!(log.contains(" stdout F first\n"), "{log}");
    assert_eq!(log.lines().count(), 3001, "nothing is lost at the end");
    node.remove_container(&side);

    let stats = cri
        .container_stats(v1::ContainerStatsRequest {
            container_id: main.clone(),
        })
        .unwrap();
    let stats = stats.stats.unwrap();
    let cpu = stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value;
    let memory = stats.memory.unwrap().working_set_bytes.unwrap().value;
    assert!(cpu > 1_000_000, "{cpu} ns of CPU time");
    assert!((4096..1 << 27).contains(&memory), "{memory} bytes");
    // TERM first, which this container answers.
    node.stop_container(&main, 60);
    let ended = node.exited(&main);
    assert_eq!(ended.exit_code, 3);
    assert!(node.log("main").contains(" stdout F got TERM\n"));
    node.remove_container(&main);

    node.stop_pod(&pod.id);
    assert_eq!(
        node.pod_state(&pod.id),
        v1::PodSandboxState::SandboxNotready
    );
    node.stop_pod(&pod.id);
    node.remove_pod(&pod.id);
    node.remove_pod(&pod.id);
    node.assert_nothing_left();
}

/// containerd takes the figures of a pod from the cgroup that the kubelet made for it, and
/// those of its containers from us.
#[test]
fn stats_of_a_pod_list_its_containers() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let cgroup = PodCgroup::new("kuasar-pod");
    skip_if!(cgroup.as_ref().err());
    let cgroup = cgroup.unwrap();
    let node = Node::new(&Options::default());
    let mut config = node.pod_config("counted");
    config.linux = Some(v1::LinuxPodSandboxConfig {
        cgroup_parent: cgroup.path(),
        ..Default::default()
    });
    let pod = node.run_pod_of(config);
    let busy = pod.run("busy", "while :; do :; done");
    let sample = || {
        let request = v1::PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let stats = node.containerd.cri.pod_sandbox_stats(request).unwrap();
        let mut stats = stats.stats.unwrap().linux.unwrap();
        assert_eq!(stats.containers.len(), 1, "{stats:?}");
        let container = stats.containers.pop().unwrap();
        assert_eq!(container.attributes.unwrap().id, busy);
        container
            .cpu
            .unwrap()
            .usage_core_nano_seconds
            .unwrap()
            .value
    };
    let first = sample();
    eventually("CPU time of a busy container", SOON, || {
        (sample() > first + 100_000_000).then_some(())
    });
    node.remove_pod(&pod.id);
    node.assert_nothing_left();
}

/// Over fifos: row 51 of the conformance suite.
#[test]
fn streams_survive_a_restart_of_containerd() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let mut node = Node::new(&Options {
        io_type: "streaming",
        ..Options::default()
    });
    let pod = node.run_pod("survivor");
    let script = "trap '' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 1; done";
    let (id, container) = (pod.id.clone(), pod.run("main", script));
    let created_at = node.status(&container).created_at;

    // Not asked politely: what it had to tell us it did not.
    node.containerd.restart(Signal::SIGKILL);
    assert_eq!(node.pod_state(&id), v1::PodSandboxState::SandboxReady);
    let status = node.status(&container);
    assert_eq!(status.state(), v1::ContainerState::ContainerRunning);
    assert_eq!(status.created_at, created_at);
    let (stdout, _, code) = node.exec(&container, "echo still here");
    assert_eq!((stdout.as_str(), code), ("still here\n", 0));
    let lines = node.log("main").lines().count();
    eventually("more output in the log", SOON, || {
        (node.log("main").lines().count() > lines).then_some(())
    });

    node.stop_container(&container, 1);
    assert_eq!(node.exited(&container).exit_code, 137);
    node.remove_pod(&id);
    node.assert_nothing_left();
}

/// containerd has the bridge plugin make each pod's interface before it starts the pod.
#[test]
fn pods_reach_each_other_over_the_bridge_plugin() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let node = Node::new(&Options::default());
    let (server, client) = (node.run_pod("server"), node.run_pod("client"));
    let of_server = node.addresses(&server.id);
    assert_eq!(
        of_server.len(),
        2,
        "one address of each family: {of_server:?}"
    );
    let _web = server.run(
        "web",
        "mkdir -p /tmp/www; echo served > /tmp/www/page; exec httpd -f -p 80 -h /tmp/www",
    );
    let shell = client.run("shell", "sleep 1000");
    for address in &of_server {
        let script = format!(
            "for i in 1 2 3 4 5; do printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | \
             nc -w 20 {address} 80 && exit; done; exit 1"
        );
        let (page, stderr, code) = node.exec(&shell, &script);
        assert_eq!(code, 0, "{address}: {stderr}");
        assert!(page.ends_with("served\n"), "{address}: {page}");
    }
    let (mtu, _, _) = node.exec(&shell, "cat /sys/class/net/eth0/mtu");
    assert_eq!(mtu, "1400\n");
    let (server, client) = (server.id.clone(), client.id.clone());
    node.remove_pod(&server);
    node.remove_pod(&client);
    node.assert_nothing_left();
}

/// containerd 2.1 calls nothing more for a pod whose start fails: cleaning up is ours.
#[test]
fn a_pod_that_cannot_start_leaves_nothing() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let node = Node::new(&Options::default());
    let refuse = |linux: v1::LinuxPodSandboxConfig| {
        let request = v1::RunPodSandboxRequest {
            config: Some(v1::PodSandboxConfig {
                linux: Some(linux),
                ..node.pod_config("refused")
            }),
            runtime_handler: HANDLER.to_owned(),
        };
        let refused = node.containerd.cri.run_pod_sandbox(request);
        refused.unwrap_err().message().to_owned()
    };
    // Refused before there is a machine, and after its guest is up.
    let host_pid = v1::NamespaceOption {
        pid: v1::NamespaceMode::Node.into(),
        ..Default::default()
    };
    let why = refuse(v1::LinuxPodSandboxConfig {
        security_context: Some(v1::LinuxSandboxSecurityContext {
            namespace_options: Some(host_pid),
            ..Default::default()
        }),
        ..Default::default()
    });
    assert!(why.contains("hostPID"), "{why}");
    let why = refuse(v1::LinuxPodSandboxConfig {
        sysctls: [("kernel.nonsense".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    });
    assert!(why.contains("kernel.nonsense"), "{why}");
    node.assert_nothing_left();
}

/// The one event that CRI takes from us: without it the exit code alone says nothing.
#[test]
fn a_container_out_of_memory_says_so() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let sockets = tempfile::tempdir().unwrap();
    let ttrpc = sockets.path().join("ttrpc");
    let config = format!("[events]\ncontainerd = {ttrpc:?}\n");
    let options = Options {
        ttrpc: Some(ttrpc),
        snapshotter: "native",
        ..Options::default()
    };
    let node = Node::with_config(&config, &options);
    let pod = node.run_pod("hungry");
    let eater = pod.run_limited("eater", "exec tail /dev/zero", 16 << 20);
    let ended = eventually("the end of the container", SOON * 4, || {
        let status = node.status(&eater);
        (status.state() == v1::ContainerState::ContainerExited).then_some(status)
    });
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    let id = pod.id.clone();
    node.remove_pod(&id);
    node.assert_nothing_left();
}

/// Pods are threads of the daemon: they end with it. containerd must learn it, and be able to
/// clean up with the next daemon.
#[test]
fn pods_of_a_daemon_that_died_can_be_removed() {
    skip_if!(kvm_missing());
    skip_if!(containerd_missing());
    let mut node = Node::new(&Options::default());
    let pod = node.run_pod("orphan");
    let container = pod.run("main", "sleep 1000");
    let id = pod.id.clone();
    node.world.daemon.kill_and_restart();
    let ended = eventually("the container's end", SOON, || {
        let status = node.status(&container);
        (status.state() == v1::ContainerState::ContainerExited).then_some(status)
    });
    assert_ne!(ended.exit_code, 0);
    eventually("the pod's end", SOON, || {
        (node.pod_state(&id) == v1::PodSandboxState::SandboxNotready).then_some(())
    });
    // What it left, containerd has our shim program clean up.
    node.containerd.restart(Signal::SIGTERM);
    assert_eq!(
        node.pod_state(&id),
        v1::PodSandboxState::SandboxNotready,
        "still"
    );
    node.remove_pod(&id);
    // The next pod has nothing to do with it.
    let next = node.run_pod("next").id;
    assert_eq!(node.pod_state(&next), v1::PodSandboxState::SandboxReady);
    node.remove_pod(&next);
    assert_eq!(node.pods(), []);
    assert_eq!(node.containerd.leftovers(), [""; 0]);
}
