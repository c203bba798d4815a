//! Runs the real agent as root in namespaces of its own, and plays the host.
#![allow(dead_code, missing_debug_implementations, missing_docs)]
#![allow(
    clippy::expect_used,
    clippy::needless_pass_by_value,
    clippy::panic,
    clippy::unwrap_used
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::time::Duration;

use agent_api::PROTOCOL_VERSION;
use agent_api::rpc::{
    AgentClient, CreateContainerRequest, CreateExecRequest, Event, EventsRequest, ExitStatus,
    ProcessRef, Ready, SignalProcessRequest, Stdio, event,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context::{self, Context};
use ttrpc::proto::Code;

const DEADLINE: Duration = Duration::from_secs(60);

pub fn ctx() -> Context {
    context::with_duration(DEADLINE)
}

/// Fails a test that hangs.
pub async fn soon<F: Future>(f: F) -> F::Output {
    timeout(DEADLINE, f)
        .await
        .expect("nothing happened in time")
}

/// The agent, its host side and a root file system.
pub struct Bed {
    child: Child,
    dir: tempfile::TempDir,
    pub listener: UnixListener,
    pub agent: AgentClient,
    pub events: ClientStreamReceiver<Event>,
    pub ready: Ready,
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- agent's log\n{}---", self.log());
        }
        // The cgroup hierarchy is the host's: what a test leaves would stay.
        for dir in self.cgroups() {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            while fs::read_to_string(dir.join("cgroup.events"))
                .is_ok_and(|e| e.contains("populated 1"))
            {}
            let _ = fs::remove_dir(dir);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bed {
    /// Starts the agent; `None` where that is impossible.
    pub async fn start() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        if !Path::new("/bin/busybox").exists() {
            println!("skipped: needs /bin/busybox (apt-get install busybox-static)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        make_rootfs(&dir.path().join("rootfs"));
        let dial = dir.path().join("dial");
        let listener = UnixListener::bind(&dial).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private", "--"])
            .arg(env!("CARGO_BIN_EXE_vmm-task"))
            .env("KUASAR_AGENT_DIAL", &dial)
            .env("KUASAR_AGENT_LISTEN", dir.path().join("streams"))
            .env("TASK_LOG_LEVEL", "debug")
            .stdin(ProcessStdio::null())
            .stdout(ProcessStdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let (agent, events, ready) = meet(&listener).await;
        Some(Self {
            child,
            dir,
            listener,
            agent,
            events,
            ready,
        })
    }

    /// Drops the connection and answers the agent's next call.
    pub async fn reconnect(&mut self) {
        // Both ends of the old one have to go before the new one comes.
        let (client, _other) = UnixStream::pair().unwrap();
        self.agent = AgentClient::new(Client::new(Socket::new(client)));
        let (client, _other) = UnixStream::pair().unwrap();
        let idle = AgentClient::new(Client::new(Socket::new(client)));
        self.events = idle
            .events(Context::default(), &EventsRequest::default())
            .await
            .unwrap();
        (self.agent, self.events, self.ready) = meet(&self.listener).await;
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Pid of the agent as this process sees it.
    pub fn pid(&self) -> u32 {
        let parent = self.child.id();
        let children =
            fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
        children.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Cgroups of this test's containers.
    fn cgroups(&self) -> Vec<PathBuf> {
        let dir = format!("/proc/{}/root/sys/fs/cgroup", self.pid());
        let mine = format!("container-{}", prefix());
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let found = entries.filter(|e| e.file_name().to_string_lossy().starts_with(&mine));
        found.map(|e| e.path()).collect()
    }

    /// What the agent holds: descriptors, mounts, bundles, cgroups, children.
    pub fn holdings(&self, id: &str) -> Vec<String> {
        let pid = self.pid();
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let list = |dir: PathBuf| -> Vec<String> {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let fds = list(proc.join("fd")).len();
        let mounts = fs::read_to_string(proc.join("mountinfo"))
            .unwrap()
            .lines()
            .count();
        let mut all = vec![format!("{fds} descriptors"), format!("{mounts} mounts")];
        all.extend(list(proc.join("root/run/kuasar/containers")));
        let cgroups = self.cgroups().into_iter();
        all.extend(
            cgroups
                .map(|c| c.to_string_lossy().into_owned())
                .filter(|c| c.ends_with(id)),
        );
        let children = fs::read_to_string(proc.join(format!("task/{pid}/children"))).unwrap();
        all.push(format!("children: {children}"));
        all
    }

    /// Whether limits can be tested here.
    pub fn has_controllers(&self) -> bool {
        let file = format!(
            "/proc/{}/root/sys/fs/cgroup/cgroup.subtree_control",
            self.pid()
        );
        let has = fs::read_to_string(file).is_ok_and(|s| s.contains("memory"));
        if !has {
            println!("skipped: cgroup v2 has no memory controller on this host");
        }
        has
    }

    pub async fn stream(&self, id: &str, exec: &str, kind: &str) -> UnixStream {
        let mut s = UnixStream::connect(self.dir.path().join("streams"))
            .await
            .unwrap();
        s.write_all(format!("{id}/{exec}/{kind}\n").as_bytes())
            .await
            .unwrap();
        s
    }

    pub async fn create(&self, id: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json: spec.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent
            .create_container(ctx(), &request)
            .await
            .map(|r| r.pid)
    }

    pub async fn start_process(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        self.agent
            .start_process(ctx(), &process(id, exec))
            .await
            .map(|r| r.pid)
    }

    pub async fn add_exec(
        &self,
        id: &str,
        exec: &str,
        args: Value,
        stdio: Stdio,
    ) -> ttrpc::Result<()> {
        let request = CreateExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process_json: process_json(args).to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent.create_exec(ctx(), &request).await.map(drop)
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            process: Some(process(id, exec)).into(),
            signal,
            all,
            ..Default::default()
        };
        self.agent.signal_process(ctx(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<ExitStatus> {
        self.agent.delete_process(ctx(), &process(id, exec)).await
    }

    /// The next exit, which must be of this process.
    pub async fn exit_of(&mut self, id: &str, exec: &str) -> ExitStatus {
        loop {
            let event = soon(self.events.recv()).await.unwrap().unwrap();
            if let Some(event::Kind::Exit(exit)) = event.kind {
                assert_eq!(
                    (
                        exit.process.container_id.as_str(),
                        exit.process.exec_id.as_str()
                    ),
                    (id, exec)
                );
                return exit.status.unwrap();
            }
        }
    }

    /// Creates, starts, collects output and exit, deletes.
    pub async fn run(&mut self, id: &str, spec: &Value) -> (u32, String, String) {
        let (mut out, mut err) = (
            self.stream(id, "", "stdout").await,
            self.stream(id, "", "stderr").await,
        );
        self.create(id, spec, outputs()).await.unwrap();
        self.start_process(id, "").await.unwrap();
        let (mut stdout, mut stderr) = (String::new(), String::new());
        soon(out.read_to_string(&mut stdout)).await.unwrap();
        soon(err.read_to_string(&mut stderr)).await.unwrap();
        let code = self.exit_of(id, "").await.code;
        assert_eq!(self.delete(id, "").await.unwrap().code, code);
        (code, stdout, stderr)
    }
}

async fn meet(listener: &UnixListener) -> (AgentClient, ClientStreamReceiver<Event>, Ready) {
    let (socket, _) = soon(listener.accept()).await.unwrap();
    let agent = AgentClient::new(Client::new(Socket::new(socket)));
    let request = EventsRequest {
        protocol_version: PROTOCOL_VERSION,
        ..Default::default()
    };
    let mut events = agent.events(Context::default(), &request).await.unwrap();
    let Some(event::Kind::Ready(ready)) = soon(events.recv()).await.unwrap().unwrap().kind else {
        panic!("the first event must be Ready");
    };
    (agent, events, ready)
}

/// Container ids are unique on the machine: the cgroup hierarchy is the host's. Every test has
/// a thread of its own.
pub fn prefix() -> String {
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    format!("t{}-{thread}-", std::process::id())
}

pub fn unique(name: &str) -> String {
    format!("{}{name}", prefix())
}

pub fn process(id: &str, exec: &str) -> ProcessRef {
    ProcessRef {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

pub fn outputs() -> Stdio {
    Stdio {
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("expected an error status, got {other:?}"),
    }
}

pub fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> String {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.message().to_owned(),
        other => panic!("expected an error status, got {other:?}"),
    }
}

fn process_json(args: Value) -> Value {
    json!({
        "cwd": "/", "user": {"uid": 0, "gid": 0}, "args": args,
        "env": ["PATH=/bin"],
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_SYS_CHROOT"], "effective": ["CAP_KILL", "CAP_SYS_CHROOT"],
            "permitted": ["CAP_KILL", "CAP_SYS_CHROOT"]
        }
    })
}

/// A container that runs `args`.
pub fn spec(bed: &Bed, args: Value) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": bed.rootfs()},
        "hostname": "inside",
        "process": process_json(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
        ]},
    })
}

pub fn shell(bed: &Bed, script: &str) -> Value {
    spec(bed, json!(["sh", "-c", script]))
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "etc", "proc", "dev", "tmp", "home/user"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let applets = Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .unwrap()
        .stdout;
    for applet in String::from_utf8(applets).unwrap().lines() {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", link).unwrap();
        }
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(root.join("bin/locked"), "#!/bin/sh\n").unwrap();
    for (name, text) in [
        ("noexec", "\x7fNOTELF"),
        ("lost", "#!/no/such/interpreter\n"),
    ] {
        let path = root.join("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
