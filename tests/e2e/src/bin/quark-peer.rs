//! A peer for `quark-sandboxer` where there is no Quark: it takes the launcher's arguments and
//! serves the Task API as Quark documents them, and nothing else. Its containers are processes
//! of this host with another root and PID namespace, not isolated any further.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a part of tests"
)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Task, create_task};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, chdir, chroot, sethostname, setsid};
use serde_json::Value;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["boot", root] => boot(Path::new(root)),
        [
            "-r",
            root,
            "sandbox",
            "--task-socket",
            socket,
            "--id",
            id,
            "--pid-file",
            pid,
        ] if !id.is_empty() => launch(Path::new(root), Path::new(socket), Path::new(pid)),
        other => Err(format!("undocumented arguments: {other:?}")),
    };
    if let Err(e) = done {
        eprintln!("quark: {e}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The launcher: binds the socket, starts the sandbox and names it.
fn launch(root: &Path, socket: &Path, pid_file: &Path) -> Result<(), String> {
    let cwd = std::env::current_dir().map_err(|e| e.to_string())?;
    if cwd != root || !socket.is_absolute() || !pid_file.is_absolute() {
        return Err(format!("started in {} with {root:?}", cwd.display()));
    }
    network(root)?;
    let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let listener = UnixListener::bind(socket).map_err(failed("the task socket"))?;
    let own = std::env::current_exe().map_err(failed("own path"))?;
    let sandbox = Command::new(own)
        .arg("boot")
        .arg(root)
        .stdin(OwnedFd::from(listener))
        .spawn()
        .map_err(failed("the sandbox"))?;
    fs::write(pid_file, sandbox.id().to_string()).map_err(failed("the pid file"))
}

/// The network namespace that `config.json` names; all it may say is looked at.
fn network(root: &Path) -> Result<Option<String>, String> {
    let text = fs::read(root.join("config.json")).map_err(|e| format!("config.json: {e}"))?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    only(&config, &["ociVersion", "process", "root", "linux"])?;
    only(&config["process"], &["user", "args", "cwd"])?;
    only(&config["linux"], &["namespaces", "resources"])?;
    only(&config["linux"]["resources"], &["cpu", "memory"])?;
    let rootfs = config["root"]["path"].as_str().unwrap_or_default();
    if !root.join(rootfs).join("dev").is_dir() || rootfs != "rootfs" {
        return Err(format!("root.path = {rootfs:?}"));
    }
    match config["linux"]["namespaces"].as_array().map(Vec::as_slice) {
        Some([one]) if one["type"] == "network" => Ok(one["path"].as_str().map(str::to_owned)),
        other => Err(format!("namespaces: {other:?}")),
    }
}

fn only(object: &Value, known: &[&str]) -> Result<(), String> {
    let object = object.as_object().ok_or("config.json: not an object")?;
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!("config.json: undocumented {key}")),
        None => Ok(()),
    }
}

/// The sandbox: its root is the folder, and it serves what its stdin listens on.
fn boot(root: &Path) -> Result<(), String> {
    let listener = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| e.to_string())?;
    let network = network(root)?;
    enter(root, network).map_err(|e| format!("entering {}: {e}", root.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(|e| e.to_string())?;
        let mut services = create_task(Arc::new(Tasks::default()));
        // Only as containerd 1.7 calls it.
        let service = services.drain().next().unwrap().1;
        services.insert("containerd.task.v2.Task".to_owned(), service);
        let incoming = UnixListenerStream::new(listener);
        let mut server = Server::new()
            .add_listener(Listener::new(incoming))
            .register_service(services);
        server.start().await.map_err(|e| e.to_string())?;
        std::future::pending().await
    })
}

fn enter(root: &Path, network: Option<String>) -> io::Result<()> {
    let none = None::<&str>;
    setsid()?;
    match network {
        Some(path) => setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?,
        None => unshare(CloneFlags::CLONE_NEWNET)?,
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    mount(
        Some(root),
        root,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )?;
    fs::create_dir_all(root.join("dev"))?;
    let (dev, flags) = (root.join("dev"), MsFlags::MS_BIND);
    mount(Some("/dev"), &dev, none, flags, none)?;
    chdir(root)?;
    chroot(".")?;
    chdir("/")?;
    fs::create_dir_all("/proc")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    Ok(())
}

/// A process: the first of a container, or an exec.
struct Process {
    spec: Value,
    /// Ends of the fifos, until it is started.
    stdio: Mutex<Option<[Option<File>; 3]>>,
    /// Their paths, where they are opened when it is started.
    paths: [String; 3],
    terminal: bool,
    pid: Mutex<u32>,
    exit: watch::Sender<Option<u32>>,
}

#[derive(Default)]
struct Tasks {
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
}

fn error(code: Code, why: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, why))
}

fn failed(why: impl std::fmt::Display) -> ttrpc::Error {
    error(Code::UNKNOWN, why)
}

fn open(paths: &[String; 3]) -> io::Result<[Option<File>; 3]> {
    let [stdin, stdout, stderr] = paths;
    let wanted = |path: &String| (!path.is_empty()).then(|| path.clone());
    let stdin = wanted(stdin).map(|path| {
        let flags = OFlag::O_NONBLOCK.bits();
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
        io::Result::Ok(file)
    });
    let output = |path| wanted(path).map(|path| File::options().write(true).open(path));
    let (stdout, stderr) = (output(stdout), output(stderr));
    Ok([stdin.transpose()?, stdout.transpose()?, stderr.transpose()?])
}

impl Tasks {
    fn get(&self, id: &str, exec: &str) -> ttrpc::Result<Arc<Process>> {
        let key = (id.to_owned(), exec.to_owned());
        let found = self.processes.lock().unwrap().get(&key).cloned();
        found.ok_or_else(|| error(Code::NOT_FOUND, format!("no process {key:?}")))
    }

    fn add(&self, id: &str, exec: &str, process: Process) -> ttrpc::Result<()> {
        let key = (id.to_owned(), exec.to_owned());
        let prefix = match exec {
            "" => String::new(),
            exec => format!("{exec}-"),
        };
        for (path, name) in process.paths.iter().zip(["stdin", "stdout", "stderr"]) {
            if !path.is_empty() && *path != format!("/{id}/{prefix}{name}") {
                return Err(failed(format!("undocumented {name}: {path}")));
            }
        }
        let mut processes = self.processes.lock().unwrap();
        if processes.contains_key(&key) {
            return Err(error(Code::ALREADY_EXISTS, format!("{key:?}")));
        }
        processes.insert(key, Arc::new(process));
        Ok(())
    }
}

/// Starts a process with `/<id>/rootfs` as its root; `beside`: in the namespaces of that one.
fn spawn(id: &str, process: &Process, beside: Option<(u32, &Process)>) -> io::Result<Child> {
    let config = beside.map_or(&process.spec, |(_, init)| &init.spec);
    let spec = match beside {
        None => &config["process"],
        Some(_) => &process.spec,
    };
    let words = |value: &Value| -> Vec<String> {
        let list = value.as_array().into_iter().flatten();
        list.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let args = words(&spec["args"]);
    let number = |key: &str| u32::try_from(spec["user"][key].as_u64().unwrap_or(0)).unwrap_or(0);
    let env = words(&spec["env"]);
    let env = env.iter().filter_map(|setting| setting.split_once('='));
    let (program, rest) = args.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command
        .args(rest)
        .env_clear()
        .envs(env)
        .uid(number("uid"))
        .gid(number("gid"))
        .current_dir(spec["cwd"].as_str().unwrap_or("/"));
    let stdio = process.stdio.lock().unwrap().take().unwrap_or_default();
    let [stdin, stdout, stderr] = stdio;
    // Opened here: the container may have none.
    let null = || File::options().read(true).write(true).open("/dev/null");
    let or_null = |file: Option<File>| file.map_or_else(null, Ok);
    if process.terminal {
        let pty = nix::pty::openpty(None, None)?;
        let slave = File::from(pty.slave);
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        let (mut from, mut to) = (File::from(pty.master.try_clone()?), File::from(pty.master));
        if let Some(mut stdin) = stdin {
            std::thread::spawn(move || io::copy(&mut stdin, &mut to));
        }
        if let Some(mut stdout) = stdout {
            std::thread::spawn(move || io::copy(&mut from, &mut stdout));
        }
    } else {
        command
            .stdin(or_null(stdin)?)
            .stdout(or_null(stdout)?)
            .stderr(or_null(stderr)?);
    }
    let hostname = config["hostname"].as_str().unwrap_or_default();
    // A process gets root and namespaces of the thread that starts it.
    let start = || {
        unshare(CloneFlags::CLONE_FS)?;
        match beside {
            None => {
                unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS)?;
                sethostname(hostname)?;
            }
            Some((pid, _)) => {
                for (name, kind) in [
                    ("uts", CloneFlags::CLONE_NEWUTS),
                    ("pid", CloneFlags::CLONE_NEWPID),
                ] {
                    setns(File::open(format!("/proc/{pid}/ns/{name}"))?, kind)?;
                }
            }
        }
        chroot(format!("/{id}/rootfs").as_str())?;
        chdir("/")?;
        command.spawn()
    };
    std::thread::scope(|scope| scope.spawn(start).join()).expect("no panic")
}

#[async_trait::async_trait]
impl Task for Tasks {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.get(&request.id, &request.exec_id)?;
        // As Quark does.
        Ok(api::StateResponse {
            pid: 123,
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id = request.id.as_str();
        if request.bundle != format!("/{id}") || !request.rootfs.is_empty() {
            return Err(failed(format!("undocumented: {request:?}")));
        }
        let spec = fs::read(format!("/{id}/config.json")).map_err(failed)?;
        let spec: Value = serde_json::from_slice(&spec).map_err(failed)?;
        let mounts = spec["mounts"].as_array().cloned().unwrap_or_default();
        if spec["root"]["path"] != "rootfs" || mounts.iter().any(|m| m["type"] == "bind") {
            return Err(failed(format!("undocumented: {spec}")));
        }
        let paths = [request.stdin, request.stdout, request.stderr];
        let stdio = open(&paths).map_err(failed)?;
        let process = Process {
            spec,
            stdio: Mutex::new(Some(stdio)),
            paths,
            terminal: request.terminal,
            pid: Mutex::new(0),
            exit: watch::Sender::new(None),
        };
        self.add(&request.id, "", process)?;
        Ok(api::CreateTaskResponse {
            pid: std::process::id(),
            ..Default::default()
        })
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.get(&request.id, "")?;
        let spec = serde_json::from_slice(&request.spec.value).map_err(failed)?;
        let process = Process {
            spec,
            stdio: Mutex::default(),
            paths: [request.stdin, request.stdout, request.stderr],
            terminal: request.terminal,
            pid: Mutex::new(0),
            exit: watch::Sender::new(None),
        };
        self.add(&request.id, &request.exec_id, process)?;
        Ok(api::Empty::default())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let process = self.get(&request.id, &request.exec_id)?;
        let init = self.get(&request.id, "")?;
        let beside = (!request.exec_id.is_empty()).then(|| (*init.pid.lock().unwrap(), &*init));
        if beside.is_some() {
            *process.stdio.lock().unwrap() = Some(open(&process.paths).map_err(failed)?);
        }
        let mut child = spawn(&request.id, &process, beside).map_err(failed)?;
        let pid = child.id();
        *process.pid.lock().unwrap() = pid;
        tokio::task::spawn_blocking(move || {
            let status = child.wait().expect("wait for a child");
            let code = status.code().or_else(|| status.signal().map(|s| 128 + s));
            process.exit.send_replace(code.map(i32::cast_unsigned));
        });
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let process = self.get(&request.id, &request.exec_id)?;
        let mut exit = process.exit.subscribe();
        let code = exit.wait_for(Option::is_some).await.map_err(failed)?;
        Ok(api::WaitResponse {
            exit_status: code.unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let process = self.get(&request.id, &request.exec_id)?;
        let pid = *process.pid.lock().unwrap();
        if pid == 0 || process.exit.borrow().is_some() {
            return Err(failed("not running"));
        }
        let signal = Signal::try_from(request.signal.cast_signed()).map_err(failed)?;
        kill(Pid::from_raw(pid.cast_signed()), signal).map_err(failed)?;
        Ok(api::Empty::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let process = self.get(&request.id, &request.exec_id)?;
        let code = *process.exit.borrow();
        let code = code.ok_or_else(|| failed("failed to get exit status from container"))?;
        let key = (request.id, request.exec_id);
        self.processes.lock().unwrap().remove(&key);
        Ok(api::DeleteResponse {
            exit_status: code,
            ..Default::default()
        })
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        self.get(&request.id, &request.exec_id)?;
        Ok(api::Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let process = self.get(&request.id, &request.exec_id)?;
        if !process.terminal || request.width == 0 || request.height == 0 {
            return Err(failed("no terminal, or no size"));
        }
        Ok(api::Empty::default())
    }
}
