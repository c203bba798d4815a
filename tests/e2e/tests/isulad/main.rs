//! The whole life of a pod as iSulad lives it, against the daemon and a real guest.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

mod client;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::World;
use harness::netns::NetNs;
use harness::{eventually, kvm_missing, skip_if};
use sandboxer::rpc::cri;
use serde_json::{Value, json};

use self::client::{Fifos, Sandboxer, Tasks};

const SLOW: Duration = Duration::from_secs(120);
const POD: &str = "isulad-pod";

/// iSulad's `<root>/engines/<runtime>/<id>`, with the files that it binds into containers.
struct Engine {
    dir: PathBuf,
    rootfs: PathBuf,
}

impl Engine {
    fn bundle(&self, id: &str, script: &str) -> (PathBuf, Value) {
        let bundle = self.dir.join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(
            self.dir.join("hosts"),
            "127.0.0.1 localhost\n10.88.0.2 sandbox\n",
        )
        .unwrap();
        let spec = json!({
            "ociVersion": "1.0.1",
            "hostname": "sandbox",
            "root": { "path": self.rootfs, "readonly": false },
            "process": {
                "args": ["/bin/sh", "-c", script],
                "cwd": "/",
                "env": ["PATH=/bin", "HOSTNAME=sandbox"],
                "user": { "uid": 0, "gid": 0 },
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "mode=755"] },
                { "destination": "/etc/hosts", "type": "bind",
                  "source": self.dir.join("hosts"), "options": ["rbind", "rprivate"] },
            ],
            "linux": {
                "cgroupsPath": format!("/isulad/{id}"),
                "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "ipc" },
                               { "type": "uts" }, { "type": "network" }],
            },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        (bundle, spec)
    }

    fn task(&self, id: &str, spec: &Value, fifos: &Fifos, processes: &[Value]) -> Value {
        json!({
            "task_id": id,
            "spec": spec,
            "rootfs": [{ "type": "bind", "source": self.rootfs }],
            "stdin": fifos.stdin,
            "stdout": fifos.stdout,
            "stderr": fifos.stderr,
            "processes": processes,
        })
    }
}

/// Gives the pod's namespace an interface, as CNI does after Start.
fn cni_add(bridge: &NetNs, pod: &NetNs) {
    bridge.ip("link add br0 type bridge");
    bridge.ip("address add 10.88.0.1/24 dev br0");
    bridge.ip("link set br0 up");
    let path = pod.path();
    bridge.ip(&format!(
        "link add port0 type veth peer name eth0 netns {}",
        path.display()
    ));
    bridge.ip("link set port0 master br0 up");
    pod.ip("link set eth0 up");
    pod.ip("address add 10.88.0.2/24 dev eth0");
    pod.ip("route add default via 10.88.0.1");
}

fn config() -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "pod".to_owned(),
            uid: "u1".to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: "sandbox".to_owned(),
        log_directory: "/var/log/pods".to_owned(),
        linux: Some(cri::LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_lives_as_isulad_has_it() {
    skip_if!(kvm_missing());
    skip_if!(NetNs::missing());
    let world = World::new();
    let (bridge, netns) = (NetNs::new(), NetNs::new());
    let engine = Engine {
        dir: world.scratch().join("engine"),
        rootfs: world.rootfs.clone(),
    };
    fs::create_dir(&engine.dir).unwrap();
    let sandboxer = Sandboxer::connect(&world.daemon.address()).await;

    // One sandbox that is lost must not keep iSulad from recovering the others.
    let platform = sandboxer.platform("nobody-knows").await;
    assert_eq!(platform.os, "linux");

    // RunPodSandbox: the network comes last.
    sandboxer.create(POD, &netns.path(), &config()).await;
    let started = sandboxer.start(POD).await;
    assert!(
        started.pid > 0 && started.created_at.is_some(),
        "{started:?}"
    );
    let exit = sandboxer.wait(POD);
    cni_add(&bridge, &netns);

    // A container: announced, created without root file system, started.
    let fifos = Fifos::new(&engine.dir, "c1");
    let script = "cat /etc/hosts; trap 'echo bye; exit 3' TERM; \
                  while :; do sleep 1000 & wait $!; done";
    let (bundle, spec) = engine.bundle("c1", script);
    let task = |processes: &[Value]| engine.task("c1", &spec, &fifos, processes);
    sandboxer.update_tasks(POD, &[task(&[])]).await;
    let tasks = Tasks::connect(&started.address).await;
    let output = fifos.read_stdout();
    tasks.create("c1", &bundle, &fifos).await;
    assert!(tasks.start("c1", "").await > 0);

    // The network that came late has reached the guest.
    eventually("an answer to a ping", SLOW, || {
        bridge.pings("10.88.0.2").then_some(())
    });

    // Exec: announced, run, and forgotten by leaving the list.
    for round in 0..2 {
        let streams = Fifos::new(&engine.dir, &format!("exec{round}"));
        let process = json!({
            "args": ["/bin/sh", "-c", "hostname; ip -4 -o address show eth0; exit 5"],
            "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        let announced = json!({
            "exec_id": "e1", "spec": process,
            "stdin": streams.stdin, "stdout": streams.stdout, "stderr": streams.stderr,
        });
        sandboxer.update_tasks(POD, &[task(&[announced])]).await;
        let printed = streams.read_stdout();
        tasks.exec("c1", "e1", &process, &streams).await;
        assert!(tasks.start("c1", "e1").await > 0);
        assert_eq!(tasks.wait("c1", "e1").await, 5);
        let printed = printed.join().unwrap();
        assert!(printed.starts_with("sandbox\n"), "{printed}");
        assert!(printed.contains("10.88.0.2/24"), "{printed}");
        sandboxer.update_tasks(POD, &[task(&[])]).await;
    }

    // Alive, and with figures that are read as cgroup v1's.
    tasks.kill("c1", 0).await.unwrap();
    assert!(!tasks.pids("c1").await.is_empty());
    let stats = tasks.stats("c1").await;
    assert!(stats.cpu.usage.total > 1_000_000, "nanoseconds: {stats}");
    assert!(stats.memory.usage.usage > 4096, "bytes: {stats}");
    assert!(stats.pids.current >= 2, "{stats}");
    tasks.pause("c1").await;
    tasks.resume("c1").await;

    // An iSulad that was restarted finds the pod by its status.
    let again = Sandboxer::connect(&world.daemon.address()).await;
    let status = again.status(POD).await;
    assert_eq!(status.state, "SANDBOX_READY");
    assert_eq!(status.address, started.address);
    let exit_again = again.wait(POD);

    // The container ends; Shutdown, which comes each time, ends nothing.
    tasks.kill("c1", 15).await.unwrap();
    assert_eq!(tasks.wait("c1", "").await, 3);
    let output = output.join().unwrap();
    assert!(
        output.contains("10.88.0.2 sandbox") && output.ends_with("bye\n"),
        "{output}"
    );
    tasks.kill("c1", 0).await.unwrap_err();
    tasks.delete_and_shutdown("c1").await;
    again.update_tasks(POD, &[]).await;
    second_container(&engine, &again, &status.address).await;

    // StopPodSandbox: the network goes first. RemovePodSandbox, twice.
    netns.ip("link delete eth0");
    netns.unbind();
    again.stop(POD).await;
    assert_eq!(exit.await.unwrap(), 0);
    assert_eq!(exit_again.await.unwrap(), 0);
    again.stop(POD).await;
    again.shutdown(POD).await;
    again.shutdown(POD).await;
    again.stop("nobody-knows").await;
    drop((sandboxer, again, tasks));
    world.assert_nothing_left();
}

/// Another container on the same pod, whose root file system is what the first wrote to.
async fn second_container(engine: &Engine, sandboxer: &Sandboxer, address: &str) {
    let fifos = Fifos::new(&engine.dir, "c2");
    let (bundle, spec) = engine.bundle("c2", "read line; echo \"got $line\"");
    let task = engine.task("c2", &spec, &fifos, &[]);
    sandboxer
        .update_tasks(POD, std::slice::from_ref(&task))
        .await;
    let tasks = Tasks::connect(address).await;
    let output = fifos.read_stdout();
    tasks.create("c2", &bundle, &fifos).await;
    assert!(tasks.start("c2", "").await > 0);
    let stdin = fifos.stdin.clone();
    write_line(&stdin).await;
    assert_eq!(tasks.wait("c2", "").await, 0);
    assert_eq!(output.join().unwrap(), "got input\n");
    tasks.delete_and_shutdown("c2").await;
    sandboxer.update_tasks(POD, &[]).await;
}

async fn write_line(fifo: &Path) {
    let fifo = fifo.to_owned();
    let written = tokio::task::spawn_blocking(move || fs::write(fifo, "input\n"));
    written.await.unwrap().unwrap();
}
