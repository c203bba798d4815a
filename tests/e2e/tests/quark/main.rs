//! `quark-sandboxer` through its own sockets, over a peer that takes nothing but what Quark
//! documents (`quark-peer`), or over Quark itself: `KUASAR_QUARK=/usr/local/bin/quark`.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

mod containerd;

use std::fs;
use std::future::Future;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use harness::daemon::Daemon;
use harness::leftovers::Held;
use harness::netns::NetNs;
use harness::{bin_dir, eventually, skip_if};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use prost::Message;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use sandboxer::rpc::controller::controller_client::ControllerClient;
use sandboxer::rpc::{POD_SANDBOX_CONFIG_TYPE, channel, controller, cri};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tonic::transport::Channel;
use ttrpc::context::{Context, with_duration};

/// The longest that anything here takes.
const SOON: Duration = Duration::from_secs(60);

fn context() -> Context {
    with_duration(SOON)
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.expect("in time")
}

struct World {
    before: Held,
    rootfs: PathBuf,
    daemon: Daemon,
    scratch: tempfile::TempDir,
}

impl World {
    fn with_quark(quark: &Path, config: &str) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let node = scratch.path().join("quark.json");
        fs::write(&node, r#"{"Sandboxed": true, "ShimMode": false}"#).unwrap();
        let config = format!("[quark]\npath = {quark:?}\nnode_config = {node:?}\n{config}");
        let daemon = Daemon::start_program("quark-sandboxer", &config);
        Self {
            before: Held::by(&daemon),
            rootfs: harness::rootfs::busybox(scratch.path()),
            daemon,
            scratch,
        }
    }

    fn new() -> Self {
        let real = std::env::var_os("KUASAR_QUARK").map(PathBuf::from);
        let quark = real.unwrap_or_else(|| bin_dir().join("quark-peer"));
        Self::with_quark(&quark, "")
    }

    /// A launcher that is a shell script.
    fn with_script(script: &str, config: &str) -> (Self, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let quark = dir.path().join("quark");
        fs::write(&quark, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&quark, fs::Permissions::from_mode(0o755)).unwrap();
        (Self::with_quark(&quark, config), dir)
    }

    async fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(channel(&self.daemon.address()).await.unwrap())
    }

    async fn create(&self, id: &str, netns: Option<&NetNs>) {
        let config = cri::PodSandboxConfig {
            hostname: "web".to_owned(),
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    memory_limit_in_bytes: 64 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = controller::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            netns_path: netns
                .map(|n| n.path().display().to_string())
                .unwrap_or_default(),
            options: Some(prost_types::Any {
                type_url: POD_SANDBOX_CONFIG_TYPE.to_owned(),
                value: config.encode_to_vec(),
            }),
            ..Default::default()
        };
        self.controller().await.create(request).await.unwrap();
    }

    async fn start(&self, id: &str) -> Result<controller::ControllerStartResponse, tonic::Status> {
        let request = controller::ControllerStartRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let started = soon(self.controller().await.start(request)).await?;
        Ok(started.into_inner())
    }

    async fn tasks(&self, id: &str) -> TaskClient {
        let socket = self.dir(id).join("task.sock");
        let address = format!("unix://{}", socket.display());
        TaskClient::new(
            ttrpc::asynchronous::Client::connect(&address)
                .await
                .unwrap(),
        )
    }

    /// A pod that is ready, its tasks, and the process of its sandbox.
    async fn pod(&self, id: &str, netns: Option<&NetNs>) -> (TaskClient, u32) {
        self.create(id, netns).await;
        let started = self.start(id).await.unwrap();
        let task = self.dir(id).join("task.sock");
        assert_eq!(started.address, format!("ttrpc+unix://{}", task.display()));
        (self.tasks(id).await, started.pid)
    }

    async fn remove(&self, id: &str) {
        let mut controller = self.controller().await;
        let stop = controller::ControllerStopRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        soon(controller.stop(stop)).await.unwrap();
        let shutdown = controller::ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        soon(controller.shutdown(shutdown)).await.unwrap();
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.daemon.state_dir().join(id)
    }

    /// A bundle that runs `script`, with more `mounts`.
    fn bundle(&self, id: &str, script: &str, mounts: &Value) -> PathBuf {
        let bundle = self.scratch.path().join(id);
        fs::create_dir_all(&bundle).unwrap();
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.rootfs},
            "process": process(script),
            "mounts": mounts,
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "network"},
                {"type": "ipc", "path": "/proc/1/ns/ipc"}, {"type": "uts", "path": "/proc/1/ns/uts"},
            ]},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.scratch.path().join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        path.display().to_string()
    }

    /// A container that was started, and what it writes.
    async fn run(
        &self,
        tasks: &TaskClient,
        id: &str,
        script: &str,
        mounts: &Value,
    ) -> pipe::Receiver {
        let stdout = self.fifo(&format!("{id}-out"));
        let reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.bundle(id, script, mounts).display().to_string(),
            stdout,
            ..Default::default()
        };
        tasks.create(context(), &request).await.unwrap();
        start(tasks, id, "").await.unwrap();
        reader
    }
}

fn process(script: &str) -> Value {
    json!({
        "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    })
}

async fn start(tasks: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
    let request = api::StartRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    tasks.start(context(), &request).await.map(|r| r.pid)
}

async fn wait(tasks: &TaskClient, id: &str, exec_id: &str) -> u32 {
    let request = api::WaitRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    tasks.wait(context(), &request).await.unwrap().exit_status
}

async fn delete(tasks: &TaskClient, id: &str, exec_id: &str) -> u32 {
    let request = api::DeleteRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    tasks.delete(context(), &request).await.unwrap().exit_status
}

/// Output and exit code of `script` beside a container.
async fn exec(world: &World, tasks: &TaskClient, id: &str, script: &str) -> (String, u32) {
    let exec_id = format!("e{}", fs::read_dir(world.scratch.path()).unwrap().count());
    let stdout = world.fifo(&exec_id);
    let reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let request = api::ExecProcessRequest {
        id: id.to_owned(),
        exec_id: exec_id.clone(),
        stdout,
        spec: MessageField::some(Any {
            value: process(script).to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    tasks.exec(context(), &request).await.unwrap();
    start(tasks, id, &exec_id).await.unwrap();
    let said = read_all(reader).await;
    let code = wait(tasks, id, &exec_id).await;
    assert_eq!(delete(tasks, id, &exec_id).await, code);
    (said, code)
}

async fn read_all(mut from: pipe::Receiver) -> String {
    let mut all = String::new();
    soon(from.read_to_string(&mut all)).await.unwrap();
    all
}

async fn read_line(from: &mut pipe::Receiver) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(soon(from.read_u8()).await.unwrap());
    }
    String::from_utf8(line).unwrap()
}

fn missing() -> Option<String> {
    NetNs::missing()
        .or_else(|| (!Path::new("/bin/busybox").exists()).then(|| "no /bin/busybox".to_owned()))
}

fn inode(path: impl AsRef<Path>) -> u64 {
    fs::metadata(path).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_live_in_quark() {
    skip_if!(missing());
    let world = World::new();
    let netns = NetNs::new();
    let (tasks, sandbox) = world.pod("p1", Some(&netns)).await;
    let config = fs::read(world.dir("p1").join("sandbox/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(
        config["linux"]["resources"],
        json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 64 << 20}})
    );
    let network = format!("/proc/{sandbox}/ns/net");
    eventually("the sandbox in its network", SOON, || {
        (inode(&network) == inode(netns.path())).then_some(())
    });

    // Volumes land inside the root file system, wherever its links point.
    let data = world.scratch.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "from the host\n").unwrap();
    symlink(world.scratch.path(), world.rootfs.join("out")).unwrap();
    symlink("/tmp", world.rootfs.join("link")).unwrap();
    let bind = |destination: &str, mode: &str| {
        json!({"destination": destination, "type": "bind", "source": data,
               "options": ["rbind", mode]})
    };
    let mounts = json!([bind("/link/data", "ro"), bind("/rw", "rw")]);
    let script = "hostname; cat /tmp/data/file; echo x > /tmp/data/new || echo read only
        echo new > /rw/made; cat /etc/hostname; exit 7";
    let out = world.run(&tasks, "c1", script, &mounts).await;
    let said = read_all(out).await;
    assert_eq!(said, "web\nfrom the host\nread only\nweb\n");
    assert_eq!(wait(&tasks, "c1", "").await, 7);
    assert_eq!(fs::read_to_string(data.join("made")).unwrap(), "new\n");
    assert_eq!(delete(&tasks, "c1", "").await, 7);
    assert!(!world.dir("p1").join("sandbox/c1").exists());
    let request = api::CreateTaskRequest {
        id: "bad".to_owned(),
        bundle: world
            .bundle("bad", "true", &json!([bind("/out/escape", "rw")]))
            .display()
            .to_string(),
        ..Default::default()
    };
    let why = tasks.create(context(), &request).await.unwrap_err();
    assert!(why.to_string().contains("/out/escape"), "{why}");
    assert!(!world.scratch.path().join("escape").exists());

    // Two containers with the pod's shared memory, stdin, execs, signals.
    let shm = json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]);
    let mut first = world
        .run(&tasks, "one", "echo up; exec sleep 1000", &shm)
        .await;
    assert_eq!(read_line(&mut first).await, "up\n");
    let request = api::CreateTaskRequest {
        id: "two".to_owned(),
        bundle: world
            .bundle("two", "cat; exit 3", &shm)
            .display()
            .to_string(),
        stdin: world.fifo("two-in"),
        stdout: world.fifo("two-out"),
        ..Default::default()
    };
    let second = pipe::OpenOptions::new()
        .open_receiver(&request.stdout)
        .unwrap();
    tasks.create(context(), &request).await.unwrap();
    start(&tasks, "two", "").await.unwrap();
    let done = exec(&world, &tasks, "one", "echo shared > /dev/shm/x; exit 5").await;
    assert_eq!(done, (String::new(), 5));
    let done = exec(&world, &tasks, "two", "cat /dev/shm/x").await;
    assert_eq!(done, ("shared\n".to_owned(), 0));
    let mut stdin = pipe::OpenOptions::new()
        .open_sender(&request.stdin)
        .unwrap();
    stdin.write_all(b"typed").await.unwrap();
    drop(stdin);
    let close = api::CloseIORequest {
        id: "two".to_owned(),
        stdin: true,
        ..Default::default()
    };
    tasks.close_io(context(), &close).await.unwrap();
    assert_eq!(read_all(second).await, "typed");
    assert_eq!(wait(&tasks, "two", "").await, 3);
    let request = api::KillRequest {
        id: "one".to_owned(),
        signal: 9,
        ..Default::default()
    };
    tasks.kill(context(), &request).await.unwrap();
    assert_eq!(wait(&tasks, "one", "").await, 137);

    // What Quark cannot do is said.
    let request = api::StatsRequest {
        id: "one".to_owned(),
        ..Default::default()
    };
    let why = tasks.stats(context(), &request).await.unwrap_err();
    assert!(why.to_string().contains("Quark has none"), "{why}");
    world.remove("p1").await;
    assert!(!Path::new(&network).exists());
    world.before.assert_back(&world.daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn launchers_that_fail_are_quoted_and_leave_nothing() {
    skip_if!(missing());
    let sleeping = "sleep 1000 & printf %s $! > \"$9\"";
    for (script, config, says) in [
        (
            "echo no KVM here >&2; exit 3",
            "",
            "exit status 3: no KVM here",
        ),
        (
            "sleep 1000",
            "[timeouts]\nboot = '1s'",
            "did not start a sandbox within 1s",
        ),
        (sleeping, "", "connect to Quark"),
    ] {
        let (world, _program) = World::with_script(script, config);
        world.create("p1", None).await;
        let why = world.start("p1").await.unwrap_err();
        assert!(why.message().contains(says), "{why}");
        world.remove("p1").await;
        world.before.assert_back(&world.daemon);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_sandbox_is_noticed() {
    skip_if!(missing());
    let world = World::new();
    let (tasks, sandbox) = world.pod("p1", None).await;
    let mut out = world
        .run(&tasks, "c1", "echo up; exec sleep 1000", &json!([]))
        .await;
    assert_eq!(read_line(&mut out).await, "up\n");
    kill(Pid::from_raw(sandbox.cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(wait(&tasks, "c1", "").await, 137);
    let request = controller::ControllerWaitRequest {
        sandbox_id: "p1".to_owned(),
        ..Default::default()
    };
    let exit = soon(world.controller().await.wait(request)).await.unwrap();
    assert_eq!(exit.into_inner().exit_status, 137);
    world.remove("p1").await;
    world.before.assert_back(&world.daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_the_daemon() {
    skip_if!(missing());
    let mut world = World::new();
    let (tasks, sandbox) = world.pod("p1", None).await;
    let script = "echo up; read -r line < /ended; exit 6";
    mkfifo(&world.rootfs.join("ended"), Mode::S_IRWXU).unwrap();
    let mut out = world.run(&tasks, "c1", script, &json!([])).await;
    assert_eq!(read_line(&mut out).await, "up\n");
    world.daemon.kill_and_restart();
    let tasks = world.tasks("p1").await;
    assert!(Path::new(&format!("/proc/{sandbox}")).exists());
    let done = exec(&world, &tasks, "c1", "hostname; exit 4").await;
    assert_eq!(done, ("web\n".to_owned(), 4));
    fs::write(world.rootfs.join("ended"), "now\n").unwrap();
    assert_eq!(wait(&tasks, "c1", "").await, 6);
    assert_eq!(delete(&tasks, "c1", "").await, 6);
    world.remove("p1").await;
    world.before.assert_back(&world.daemon);

    // One that nobody can take over is ended.
    let (_, sandbox) = world.pod("p2", None).await;
    fs::remove_file(world.dir("p2").join("live.json")).unwrap();
    world.daemon.kill_and_restart();
    assert!(!world.dir("p2").exists());
    assert!(!Path::new(&format!("/proc/{sandbox}/root")).exists());
    world.before.assert_back(&world.daemon);
}
