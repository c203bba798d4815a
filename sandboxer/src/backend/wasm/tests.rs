//! The daemon over its real sockets, with WebAssembly pods.

mod grants;
mod scale;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use ttrpc::Code;
use ttrpc::context::with_duration;

use super::spec::{Mount, Source, Spec};
use super::*;
use crate::config::Config;
use crate::rpc::controller::controller_client::ControllerClient;
use crate::rpc::{channel, controller as rpc};
use crate::server::{RunningServer, Server, ServerOptions};

const SOON: Duration = Duration::from_secs(60);

fn settings() -> config::Wasm {
    config::Wasm {
        max_instances: 64,
        cache_size: bytesize::ByteSize(0),
        ..config::Wasm::default()
    }
}

fn spec_of(spec: &Value) -> Spec {
    Spec::of(spec, Path::new("/share"), &settings()).unwrap()
}

#[test]
fn a_spec_grants_what_it_says() {
    let share = agent_api::SHARE_DIR;
    let spec = spec_of(&json!({
        "process": {
            "args": ["app.wasm", "-x"], "env": ["A=1", "B=", "broken"], "cwd": "/work",
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]
        },
        "root": {"path": format!("{share}/c1/rootfs"), "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]},
            {"destination": "/data", "type": "bind", "source": format!("{share}/c1/mounts/0"),
             "options": ["rbind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "options": ["nosuid", "size=1m"]},
            {"destination": "/out", "type": "bind", "source": "/etc", "options": ["rbind"]},
            {"destination": "/dev/termination-log", "type": "bind",
             "source": format!("{share}/c1/mounts/1"), "options": ["rbind", "rw"]},
        ],
        "linux": {"resources": {
            "memory": {"limit": 1_048_576},
            "cpu": {"shares": 512, "quota": 50_000, "period": 200_000}
        }}
    }));
    assert_eq!(spec.process.args, ["app.wasm", "-x"]);
    assert_eq!(
        spec.process.env,
        [("A".into(), "1".into()), ("B".into(), String::new())]
    );
    assert_eq!((spec.process.cwd.as_str(), spec.read_only), ("/work", true));
    assert_eq!(spec.root, Path::new("/share/c1/rootfs"));
    let mounts = [
        Mount {
            source: Source::Bind("/share/c1/mounts/0".into()),
            destination: "/data".to_owned(),
            read_only: true,
        },
        Mount {
            source: Source::Memory("size=1m".to_owned()),
            destination: "/tmp".to_owned(),
            read_only: false,
        },
        Mount {
            source: Source::Bind("/share/c1/mounts/1".into()),
            destination: "/dev/termination-log".to_owned(),
            read_only: false,
        },
    ];
    assert_eq!(
        spec.mounts, mounts,
        "nothing of the system, nothing outside the share"
    );
    assert_eq!(spec.limits.memory_bytes, Some(1 << 20));
    assert_eq!((spec.limits.cpu_shares, spec.limits.handles), (512, 100));
    let quota = spec.limits.cpu_quota.unwrap();
    assert_eq!(
        (quota.quota.as_millis(), quota.period.as_millis()),
        (50, 200)
    );
}

#[test]
fn limits_are_lifted_by_what_lifts_them_in_linux() {
    let mut limits = wasm_host::Limits::default();
    let cpu = json!({"cpu": {"quota": 1000, "shares": 2}, "memory": {"limit": 5}});
    super::spec::update(&mut limits, &cpu);
    assert!(limits.cpu_quota.is_some() && limits.memory_bytes == Some(5));
    let none = json!({"cpu": {"quota": -1}, "memory": {"limit": -1}});
    super::spec::update(&mut limits, &none);
    assert_eq!(
        (limits.cpu_quota, limits.memory_bytes, limits.cpu_shares),
        (None, None, 2)
    );
}

#[test]
fn specs_that_name_nothing_to_run_are_refused() {
    let root = json!({"path": format!("{}/c1/rootfs", agent_api::SHARE_DIR)});
    for spec in [
        json!({"root": root}),
        json!({"root": root, "process": {"args": []}}),
        json!({"root": {"path": "/"}, "process": {"args": ["x"]}}),
    ] {
        Spec::of(&spec, Path::new("/share"), &settings()).unwrap_err();
    }
}

/// Why the daemon cannot run here.
fn missing() -> Option<String> {
    harness::wasm::clang_missing()
        .or_else(|| (!nix::unistd::geteuid().is_root()).then(|| "mounting needs root".to_owned()))
}

struct Daemon {
    server: RunningServer,
    root: tempfile::TempDir,
}

impl Daemon {
    async fn start(settings: config::Wasm) -> Self {
        let root = tempfile::tempdir().unwrap();
        let server = Server::start(ServerOptions {
            listen: root.path().join("s.sock"),
            dir: root.path().join("pods"),
            config: Config::default(),
            pods_outlive: false,
            backend: Some(Arc::new(WasmBackend::new(settings).unwrap())),
        })
        .await
        .unwrap();
        Self { server, root }
    }

    async fn pod(&self, id: &str) -> Tasks {
        let channel = channel(self.server.address()).await.unwrap();
        let mut client = ControllerClient::new(channel);
        let create = rpc::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        client.create(create).await.unwrap();
        let start = rpc::ControllerStartRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let address = client.start(start).await.unwrap().into_inner().address;
        let socket = address.strip_prefix("ttrpc+").unwrap();
        let client = ttrpc::asynchronous::Client::connect(socket).await.unwrap();
        Tasks {
            client: TaskClient::new(client),
            root: self.root.path().join(format!("bundles-{id}")),
        }
    }

    async fn end(self) {
        self.server.shutdown(SOON).await;
        assert!(
            std::fs::read_dir(self.root.path().join("pods"))
                .unwrap()
                .count()
                <= 1
        );
    }
}

struct Tasks {
    client: TaskClient,
    root: PathBuf,
}

impl Tasks {
    /// Makes a bundle whose root file system holds the suite, and creates a container of it.
    async fn create(&self, id: &str, process: Value, resources: Value) -> ttrpc::Result<PathBuf> {
        let spec = json!({
            "ociVersion": "1.1.0", "process": process, "root": {"path": "rootfs"},
            "linux": {"resources": resources},
        });
        self.create_with(id, &spec).await
    }

    async fn create_with(&self, id: &str, spec: &Value) -> ttrpc::Result<PathBuf> {
        let bundle = self.root.join(id);
        let rootfs = bundle.join("rootfs");
        std::fs::create_dir_all(&rootfs).unwrap();
        std::fs::write(rootfs.join("suite.wasm"), harness::wasm::suite()).unwrap();
        std::fs::write(rootfs.join("busybox"), b"\x7fELF\x02\x01\x01").unwrap();
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let out = bundle.join("out");
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_str().unwrap().to_owned(),
            stdout: format!("file://{}", out.display()),
            stderr: format!("file://{}", bundle.join("err").display()),
            ..Default::default()
        };
        self.client.create(context(), &request).await.map(|_| out)
    }

    async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.client
            .start(context(), &request)
            .await
            .map(|reply| reply.pid)
    }

    async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.client
            .wait(context(), &request)
            .await
            .unwrap()
            .exit_status
    }

    async fn kill(&self, id: &str, exec: &str, signal: u32) {
        let request = api::KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            ..Default::default()
        };
        self.client.kill(context(), &request).await.unwrap();
    }

    async fn delete(&self, id: &str, exec: &str) {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.client.delete(context(), &request).await.unwrap();
    }

    /// Runs a container to its end: the exit code and what it wrote.
    async fn run(&self, id: &str, args: &[&str], resources: Value) -> (u32, String) {
        let out = self.create(id, process(args), resources).await.unwrap();
        self.run_created(id, &out).await
    }

    async fn run_created(&self, id: &str, out: &Path) -> (u32, String) {
        self.start(id, "").await.unwrap();
        let code = self.wait(id, "").await;
        self.delete(id, "").await;
        (code, std::fs::read_to_string(out).unwrap())
    }
}

fn context() -> ttrpc::context::Context {
    with_duration(SOON)
}

fn process(args: &[&str]) -> Value {
    let args: Vec<_> = std::iter::once(&"/suite.wasm").chain(args).collect();
    json!({"args": args, "env": ["A=1"], "cwd": "/"})
}

fn code_of(error: &ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_live_like_any_others() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(settings()).await;
    let tasks = daemon.pod("p1").await;
    let (code, out) = tasks.run("hello", &["args", "x"], json!({})).await;
    assert_eq!((code, out.as_str()), (0, "/suite.wasm\nargs\nx\n"));
    let (code, out) = tasks.run("env", &["env"], json!({})).await;
    assert_eq!((code, out.as_str()), (0, "A=1\n"));
    assert_eq!(tasks.run("code", &["exit", "200"], json!({})).await.0, 200);
    let (code, out) = tasks.run("files", &["files", "/"], json!({})).await;
    assert_eq!((code, out.as_str()), (0, "ok\n"));
    let (_, out) = tasks.run("hosts", &["get", "/etc/hosts"], json!({})).await;
    assert!(out.contains("localhost"), "the pod's own file: {out}");
    let limit = json!({"memory": {"limit": 8 << 20}});
    let (code, out) = tasks.run("hog", &["eat", "100"], limit).await;
    assert!(code == 3 && out.contains("refused"), "{code} {out}");
    assert_eq!(tasks.run("trap", &["abort"], json!({})).await.0, 134);

    // One that stays, with another in it, paused, measured, limited and killed.
    tasks
        .create("long", process(&["sleep", "3600"]), json!({}))
        .await
        .unwrap();
    assert_ne!(tasks.start("long", "").await.unwrap(), 0);
    let exec = api::ExecProcessRequest {
        id: "long".to_owned(),
        exec_id: "e1".to_owned(),
        spec: protobuf::MessageField::some(protobuf::well_known_types::any::Any {
            value: process(&["exit", "9"]).to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    tasks.client.exec(context(), &exec).await.unwrap();
    tasks.start("long", "e1").await.unwrap();
    assert_eq!(tasks.wait("long", "e1").await, 9);
    tasks.delete("long", "e1").await;
    let pause = api::PauseRequest {
        id: "long".to_owned(),
        ..Default::default()
    };
    tasks.client.pause(context(), &pause).await.unwrap();
    let resume = api::ResumeRequest {
        id: "long".to_owned(),
        ..Default::default()
    };
    tasks.client.resume(context(), &resume).await.unwrap();
    let stats = api::StatsRequest {
        id: "long".to_owned(),
        ..Default::default()
    };
    let stats = tasks.client.stats(context(), &stats).await.unwrap();
    assert!(stats.stats.type_url.ends_with("Metrics"));
    let update = api::UpdateTaskRequest {
        id: "long".to_owned(),
        resources: protobuf::MessageField::some(protobuf::well_known_types::any::Any {
            value: br#"{"memory":{"limit":33554432}}"#.to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    tasks.client.update(context(), &update).await.unwrap();
    tasks.kill("long", "", 15).await;
    assert_eq!(tasks.wait("long", "").await, 143);
    tasks.delete("long", "").await;
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_program_is_refused_by_its_start() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(settings()).await;
    let tasks = daemon.pod("p1").await;
    for (id, program, code, part) in [
        (
            "linux",
            "/busybox",
            Code::PERMISSION_DENIED,
            "a Linux program",
        ),
        ("none", "/missing.wasm", Code::NOT_FOUND, "/missing.wasm"),
    ] {
        let process = json!({"args": [program], "cwd": "/"});
        tasks.create(id, process, json!({})).await.unwrap();
        let error = tasks.start(id, "").await.unwrap_err();
        assert!(
            code_of(&error) == code && error.to_string().contains(part),
            "{error}"
        );
        tasks.delete(id, "").await;
    }
    // What could not be started, or was not, ends when it is killed: containerd waits for it.
    let bad = json!({"args": ["/busybox"]});
    tasks.create("bad", bad, json!({})).await.unwrap();
    tasks.start("bad", "").await.unwrap_err();
    tasks.create("idle", process(&[]), json!({})).await.unwrap();
    for id in ["bad", "idle"] {
        tasks.kill(id, "", 9).await;
        assert_eq!(tasks.wait(id, "").await, 137);
        tasks.delete(id, "").await;
    }
    let low = json!({"memory": {"limit": 1000}});
    tasks.create("low", process(&[]), low).await.unwrap();
    let error = tasks.start("low", "").await.unwrap_err();
    assert!(error.to_string().contains("memory limit"), "{error}");
    tasks.delete("low", "").await;
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_container_may_have_its_thread_and_pods_end_with_all_of_it() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(config::Wasm {
        threads: config::WasmThreads::Container,
        ..settings()
    })
    .await;
    let tasks = daemon.pod("p1").await;
    for id in ["a", "b"] {
        tasks
            .create(id, process(&["spin"]), json!({}))
            .await
            .unwrap();
        tasks.start(id, "").await.unwrap();
    }
    // The status of each such thread.
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks
            .filter_map(|entry| std::fs::read_to_string(entry.path().join("status")).ok())
            .filter(|status| {
                ["Name:\twasm-a\n", "Name:\twasm-b\n"]
                    .iter()
                    .any(|n| status.contains(n))
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(threads().len(), 2);
    for status in threads() {
        assert!(status.contains("Seccomp:\t2\n"), "confined: {status}");
    }
    let (code, out) = tasks.run("c", &["clocks"], json!({})).await;
    assert_eq!((code, out.as_str()), (0, "ok\n"));
    daemon.end().await;
    harness::eventually("the end of the threads", SOON, || {
        threads().is_empty().then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_the_programs_own() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(settings()).await;
    let tasks = daemon.pod("p1").await;
    let bundle = tasks.root.join("cat");
    tasks
        .create("template", process(&[]), json!({}))
        .await
        .unwrap();
    std::fs::rename(tasks.root.join("template"), &bundle).unwrap();
    let spec = json!({"process": process(&["cat"]), "root": {"path": "rootfs"}});
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let fifo = |name: &str| {
        let path = bundle.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    };
    let (stdin, stdout) = (fifo("in"), fifo("piped"));
    let mut reader = tokio::net::unix::pipe::OpenOptions::new()
        .open_receiver(&stdout)
        .unwrap();
    let request = api::CreateTaskRequest {
        id: "cat".to_owned(),
        bundle: bundle.to_str().unwrap().to_owned(),
        stdin: stdin.to_str().unwrap().to_owned(),
        stdout: stdout.to_str().unwrap().to_owned(),
        ..Default::default()
    };
    tasks.client.create(context(), &request).await.unwrap();
    tasks.start("cat", "").await.unwrap();
    tokio::fs::write(&stdin, "through the pod").await.unwrap();
    let close = api::CloseIORequest {
        id: "cat".to_owned(),
        stdin: true,
        ..Default::default()
    };
    tasks.client.close_io(context(), &close).await.unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "through the pod");
    assert_eq!(tasks.wait("cat", "").await, 0);
    daemon.end().await;
}
