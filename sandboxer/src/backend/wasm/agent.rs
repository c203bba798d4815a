//! Runs the containers of a pod.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use agent_api::rpc;
use agent_api::stream::StreamKind;
use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use vmm_core::vm::{ExitReason, GuestStream, Vm, VmError};
use wasm_host::{
    Ended, Host, Lane, LaneConfig, Network, Program, Root, Settings, Stats, WasmError,
};

use super::container::{Loaded, WasmContainer, WasmProcess};
use super::files;
use super::lock;
use super::spec::{self, Process, Spec};
use crate::agent::{Agent, AgentError, AgentEvent, Connected, ProcessId};
use crate::backend::MachineRequest;
use crate::config::{self, WasmThreads};
use crate::pod::{ErrorCode, PodError};

type Result<T> = std::result::Result<T, AgentError>;

/// Events that nobody has taken yet.
const EVENT_BACKLOG: usize = 256;

const SIGTERM: u32 = 15;
/// Signals that end a process which has not begun: HUP, INT, QUIT, KILL, TERM.
const ENDING: [u32; 5] = [1, 2, 3, 9, SIGTERM];

/// Where programs without a path are looked for.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A pod of WebAssembly programs.
#[derive(Debug)]
pub(super) struct WasmPod {
    host: Host,
    settings: Arc<config::Wasm>,
    request: MachineRequest,
    /// The pod's thread, where it has one.
    lane: Option<Lane>,
    containers: Mutex<HashMap<String, Arc<WasmContainer>>>,
    events: mpsc::Sender<AgentEvent>,
    /// Until somebody connects.
    received: Mutex<Option<mpsc::Receiver<AgentEvent>>>,
    exit: watch::Sender<Option<ExitReason>>,
    /// Programs that run.
    alive: watch::Sender<usize>,
    paused: AtomicBool,
    last_pid: AtomicU32,
}

/// The pod as the daemon calls it.
#[derive(Debug)]
struct WasmAgent(Arc<WasmPod>);

impl WasmPod {
    /// Starts the pod's thread. Blocks.
    pub(super) fn new(
        host: Host,
        settings: Arc<config::Wasm>,
        request: MachineRequest,
    ) -> wasm_host::Result<Arc<Self>> {
        let (events, received) = mpsc::channel(EVENT_BACKLOG);
        let mut pod = Self {
            host,
            settings,
            request,
            lane: None,
            containers: Mutex::default(),
            events,
            received: Mutex::new(Some(received)),
            exit: watch::Sender::new(None),
            alive: watch::Sender::new(0),
            paused: AtomicBool::new(false),
            last_pid: AtomicU32::new(0),
        };
        if pod.settings.threads == WasmThreads::Pod {
            pod.lane = Some(pod.start_lane(&pod.request.pod)?);
        }
        Ok(Arc::new(pod))
    }

    fn start_lane(&self, name: &str) -> wasm_host::Result<Lane> {
        let open = |path: &PathBuf| {
            File::open(path).map_err(|source| WasmError::Io {
                what: format!("opening the network namespace {}", path.display()),
                source,
            })
        };
        Lane::start(LaneConfig {
            name: format!("wasm-{name}"),
            netns: self.request.netns.as_ref().map(open).transpose()?,
            seccomp: self.settings.seccomp,
            nice: self.settings.nice,
        })
    }

    pub(super) fn connect(self: Arc<Self>) -> Option<Connected> {
        let events = lock(&self.received).take()?;
        let ready = rpc::Ready {
            protocol_version: agent_api::PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: "WASI 0.2".to_owned(),
            cpus: std::thread::available_parallelism()
                .ok()
                .and_then(|cpus| u32::try_from(cpus.get()).ok())
                .unwrap_or(1),
            memory_bytes: self.settings.max_memory.as_u64(),
            ..Default::default()
        };
        Some(Connected {
            client: Arc::new(WasmAgent(self)),
            ready,
            events,
        })
    }

    pub(super) fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.subscribe()
    }

    /// Ends every program at once, and the pod with them.
    pub(super) fn kill(&self) {
        for container in lock(&self.containers).values() {
            container.container.kill();
        }
        self.exit
            .send_if_modified(|exit| exit.replace(ExitReason::Stopped).is_none());
    }

    /// Waits until no program runs.
    pub(super) async fn ended(&self) {
        let mut alive = self.alive.subscribe();
        // The sender lives in `self`.
        let _ = alive.wait_for(|&alive| alive == 0).await;
    }

    pub(super) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
        for container in lock(&self.containers).values() {
            if paused {
                container.container.pause();
            } else {
                container.container.resume();
            }
        }
    }

    /// Linear memory of all its containers.
    pub(super) fn memory_bytes(&self) -> u64 {
        let containers = lock(&self.containers);
        containers
            .values()
            .map(|container| container.container.stats().memory_bytes)
            .sum()
    }

    fn container(&self, call: &'static str, id: &str) -> Result<Arc<WasmContainer>> {
        lock(&self.containers).get(id).cloned().ok_or_else(|| {
            refused(
                call,
                ErrorCode::NotFound,
                format!("container {id} not found"),
            )
        })
    }

    fn process(
        &self,
        call: &'static str,
        id: &ProcessId,
    ) -> Result<(Arc<WasmContainer>, Arc<WasmProcess>)> {
        let container = self.container(call, &id.container_id)?;
        let process = container.process(&id.exec_id).ok_or_else(|| {
            let message = format!("exec {} not found", id.exec_id);
            refused(call, ErrorCode::NotFound, message)
        })?;
        Ok((container, process))
    }

    fn next_pid(&self) -> u32 {
        self.last_pid.fetch_add(1, Ordering::AcqRel).wrapping_add(1)
    }

    /// Finds and compiles what a process runs; a failure belongs to its start.
    async fn load(&self, root: PathBuf, process: &Process) -> Loaded {
        let (program, cwd) = (
            process.args.first().cloned().unwrap_or_default(),
            process.cwd.clone(),
        );
        let path = process.variable("PATH").unwrap_or(DEFAULT_PATH).to_owned();
        let name = program.clone();
        let opened =
            tokio::task::spawn_blocking(move || Root::open(&root)?.program(&program, &cwd, &path));
        let file = opened.await.map_err(|e| WasmError::Internal {
            name: name.clone(),
            reason: e.to_string(),
        })??;
        self.host.load_file(&name, file).await
    }

    fn settings(&self, process: &Process) -> std::result::Result<Settings, PodError> {
        let mut env = process.env.clone();
        // Preview 1 has no working directory; programs that care look here.
        if process.cwd != "/" && process.variable("PWD").is_none() {
            env.push(("PWD".to_owned(), process.cwd.clone()));
        }
        Ok(Settings {
            args: process.args.clone(),
            env,
            cwd: Some(process.cwd.clone()),
            network: match self.request.netns {
                Some(_) => Network::Namespace,
                None => Network::Denied,
            },
            http_listen: Some(process.http_listen(self.settings.http_listen)?),
            ..Settings::default()
        })
    }

    async fn create(
        self: &Arc<Self>,
        call: &'static str,
        request: rpc::CreateContainerRequest,
    ) -> Result<u32> {
        let invalid = |e: PodError| refused(call, e.code(), e.to_string());
        let json: Value = serde_json::from_slice(&request.spec_json)
            .map_err(|e| refused(call, ErrorCode::InvalidArgument, e.to_string()))?;
        let spec = Spec::of(&json, &self.request.share, &self.settings).map_err(invalid)?;
        let mut settings = self.settings(&spec.process).map_err(invalid)?;
        settings.limits = spec.limits.clone();
        let arranged = spec.clone();
        let failed = |e: tokio::task::JoinError| refused(call, ErrorCode::Internal, e.to_string());
        settings.mounts = tokio::task::spawn_blocking(move || files::arrange(&arranged))
            .await
            .map_err(failed)?;
        // What is mounted may be the program.
        let program = self.load(spec.root.clone(), &spec.process).await;
        let lane = match &self.lane {
            Some(lane) => lane.clone(),
            None => {
                let (pod, id) = (Arc::clone(self), request.container_id.clone());
                let started = tokio::task::spawn_blocking(move || pod.start_lane(&id));
                let started = started.await.map_err(failed)?;
                started.map_err(|e| refused(call, ErrorCode::Internal, e.to_string()))?
            }
        };
        let init = WasmProcess::new(settings.clone(), program, &request.stdio)
            .map_err(|e| refused(call, ErrorCode::Internal, e.to_string()))?;
        let pid = self.next_pid();
        init.set_pid(pid);
        let container = WasmContainer {
            limits: Mutex::new(spec.limits.clone()),
            container: self.host.container(settings),
            spec,
            lane,
            init: Arc::new(init),
            execs: Mutex::default(),
        };
        if self.paused.load(Ordering::Acquire) {
            container.container.pause();
        }
        lock(&self.containers).insert(request.container_id, Arc::new(container));
        Ok(pid)
    }

    async fn start(self: &Arc<Self>, call: &'static str, id: &ProcessId) -> Result<u32> {
        let (container, process) = self.process(call, id)?;
        let program = lock(&process.program)
            .take()
            .ok_or_else(|| refused(call, ErrorCode::FailedPrecondition, "it was started before"))?;
        let program = program.map_err(|e| refused(call, start_code(&e), e.to_string()))?;
        if program.is_proxy() && self.request.netns.is_none() {
            return Err(refused(
                call,
                ErrorCode::FailedPrecondition,
                "the program serves HTTP requests, and its pod has no network namespace",
            ));
        }
        let pid = match process.pid() {
            0 => self.next_pid(),
            pid => pid,
        };
        process.set_pid(pid);
        self.alive.send_modify(|alive| *alive += 1);
        let started = self.run(&container, &process, &program, id).await;
        match started {
            Ok(running) => {
                process.runs(running.clone());
                let (pod, id) = (Arc::clone(self), id.clone());
                tokio::spawn(async move { pod.follow(&running, id).await });
                Ok(pid)
            }
            Err(e) => {
                self.alive.send_modify(|alive| *alive -= 1);
                Err(refused(call, start_code(&e), e.to_string()))
            }
        }
    }

    async fn run(
        &self,
        container: &WasmContainer,
        process: &WasmProcess,
        program: &Arc<Program>,
        id: &ProcessId,
    ) -> wasm_host::Result<wasm_host::Process> {
        let (lane, stdio) = (&container.lane, process.take_stdio());
        if id.exec_id.is_empty() {
            return container.container.start(lane, program, stdio).await;
        }
        let settings = process.settings.clone();
        container
            .container
            .exec(lane, program, stdio, settings)
            .await
    }

    /// Tells the end of a process.
    async fn follow(&self, running: &wasm_host::Process, id: ProcessId) {
        let exit = running.wait().await;
        if exit.ended == Ended::OutOfMemory {
            self.tell(AgentEvent::Oom {
                container_id: id.container_id.clone(),
            })
            .await;
        }
        if id.exec_id.is_empty()
            && let Ok(container) = self.container("end", &id.container_id)
        {
            // As in a PID namespace: with the first process all others end.
            container.container.kill();
        }
        self.tell(AgentEvent::Exit {
            process: id,
            code: exit.code,
        })
        .await;
        self.alive.send_modify(|alive| *alive -= 1);
    }

    /// A signal to a process that was not started, or could not be: whatever ends a process
    /// ends it, and containerd waits for that end before it deletes the process.
    async fn signal_created(&self, id: &ProcessId, process: &WasmProcess, signal: u32) {
        if !ENDING.contains(&signal) {
            return;
        }
        drop(lock(&process.program).take());
        drop(process.take_stdio());
        self.tell(AgentEvent::Exit {
            process: id.clone(),
            code: 128 + signal,
        })
        .await;
    }

    /// Nobody listens once the pod has ended, so nobody is waited for then.
    async fn tell(&self, event: AgentEvent) {
        let mut exit = self.exit.subscribe();
        tokio::select! {
            biased;
            _ = self.events.send(event) => {}
            () = async { drop(exit.wait_for(Option::is_some).await) } => {}
        }
    }
}

/// How callers see that a program cannot be started.
fn start_code(error: &WasmError) -> ErrorCode {
    match error {
        WasmError::NotFound { .. } => ErrorCode::NotFound,
        WasmError::NotWasm { .. }
        | WasmError::TooLarge { .. }
        | WasmError::Text { .. }
        | WasmError::Invalid { .. }
        | WasmError::UnknownImports { .. }
        | WasmError::NoEntry { .. } => ErrorCode::PermissionDenied,
        WasmError::MemoryLimit { .. } => ErrorCode::InvalidArgument,
        _ => ErrorCode::Internal,
    }
}

fn refused(call: &'static str, code: ErrorCode, message: impl Into<String>) -> AgentError {
    AgentError::Refused {
        call,
        code,
        message: message.into(),
    }
}

#[async_trait]
impl Agent for WasmAgent {
    async fn setup_sandbox(&self, _request: rpc::SetupSandboxRequest) -> Result<()> {
        // Host name, clock, entropy and network are the host's.
        Ok(())
    }

    async fn create_container(&self, request: rpc::CreateContainerRequest) -> Result<u32> {
        self.0.create("create the container", request).await
    }

    async fn create_exec(&self, request: rpc::CreateExecRequest) -> Result<()> {
        const CALL: &str = "create the process";
        let container = self.0.container(CALL, &request.container_id)?;
        let invalid = |e: PodError| refused(CALL, e.code(), e.to_string());
        let json: Value = serde_json::from_slice(&request.process_json)
            .map_err(|e| refused(CALL, ErrorCode::InvalidArgument, e.to_string()))?;
        let process = Process::of(&json).map_err(invalid)?;
        let program = self.0.load(container.spec.root.clone(), &process).await;
        let settings = self.0.settings(&process).map_err(invalid)?;
        let process = WasmProcess::new(settings, program, &request.stdio)
            .map_err(|e| refused(CALL, ErrorCode::Internal, e.to_string()))?;
        lock(&container.execs).insert(request.exec_id, Arc::new(process));
        Ok(())
    }

    async fn start_process(&self, process: &ProcessId) -> Result<u32> {
        const CALL: &str = "start the process";
        let started = self.0.start(CALL, process).await;
        if started.is_err()
            && let Ok((_, process)) = self.0.process(CALL, process)
        {
            // Whoever reads its output sees the end.
            drop(process.take_stdio());
        }
        started
    }

    async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<()> {
        const CALL: &str = "signal the process";
        let (container, first) = self.0.process(CALL, process)?;
        let Some(running) = first.running() else {
            self.0.signal_created(process, &first, signal).await;
            return Ok(());
        };
        if !all {
            running.signal(signal);
            return Ok(());
        }
        for process in container.processes() {
            if let Some(running) = process.running() {
                running.signal(signal);
            }
        }
        Ok(())
    }

    async fn resize_pty(&self, process: &ProcessId, width: u32, height: u32) -> Result<()> {
        const CALL: &str = "resize the terminal";
        let (_, process) = self.0.process(CALL, process)?;
        process
            .resize(width, height)
            .map_err(|e| refused(CALL, ErrorCode::FailedPrecondition, e.to_string()))
    }

    async fn close_stdin(&self, _process: &ProcessId) -> Result<()> {
        // The half-close of the stream says the same.
        Ok(())
    }

    async fn delete_process(&self, process: &ProcessId) -> Result<()> {
        const CALL: &str = "delete the process";
        let (container, _) = self.0.process(CALL, process)?;
        if process.exec_id.is_empty() {
            container.container.kill();
            lock(&self.0.containers).remove(&process.container_id);
        } else {
            lock(&container.execs).remove(&process.exec_id);
        }
        // The last handle on a lane of the container's own waits for its thread.
        let _ = tokio::task::spawn_blocking(move || drop(container)).await;
        Ok(())
    }

    async fn list_pids(&self, container_id: &str) -> Result<Vec<u32>> {
        let container = self.0.container("list pids", container_id)?;
        let processes = container.processes();
        let alive = processes.iter().rev().filter(|process| process.is_alive());
        Ok(alive.map(|process| process.pid()).collect())
    }

    async fn stats(&self, container_id: &str) -> Result<rpc::StatsResponse> {
        let container = self.0.container("read statistics", container_id)?;
        Ok(to_rpc(&container.container.stats()))
    }

    async fn pause_container(&self, container_id: &str) -> Result<()> {
        let container = self.0.container("pause the container", container_id)?;
        container.container.pause();
        Ok(())
    }

    async fn resume_container(&self, container_id: &str) -> Result<()> {
        let container = self.0.container("resume the container", container_id)?;
        container.container.resume();
        Ok(())
    }

    async fn update_container(&self, container_id: &str, resources: Vec<u8>) -> Result<()> {
        const CALL: &str = "update the container";
        let container = self.0.container(CALL, container_id)?;
        let resources: Value = serde_json::from_slice(&resources)
            .map_err(|e| refused(CALL, ErrorCode::InvalidArgument, e.to_string()))?;
        let mut limits = lock(&container.limits);
        spec::update(&mut limits, &resources);
        container.container.update(&limits);
        Ok(())
    }

    async fn shutdown(&self) -> Result<()> {
        let containers: Vec<_> = lock(&self.0.containers).values().cloned().collect();
        let pod = Arc::clone(&self.0);
        // The answer does not wait for the programs, as a guest's does not.
        tokio::spawn(async move {
            for process in containers
                .iter()
                .flat_map(|container| container.processes())
            {
                if let Some(running) = process.running() {
                    running.signal(SIGTERM);
                }
            }
            pod.ended().await;
            pod.kill();
        });
        Ok(())
    }

    async fn open_stream(
        &self,
        _vm: &dyn Vm,
        process: &ProcessId,
        kind: StreamKind,
    ) -> std::result::Result<Box<dyn GuestStream>, VmError> {
        let missing = || VmError::Io {
            what: format!("opening {} of {}", kind.as_str(), process.container_id),
            source: std::io::ErrorKind::NotFound.into(),
        };
        let (_, process) = self
            .0
            .process("open a stream", process)
            .map_err(|_| missing())?;
        process.stream(kind).ok_or_else(missing)
    }
}

fn to_rpc(stats: &Stats) -> rpc::StatsResponse {
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    rpc::StatsResponse {
        cpu_usage_us: micros(stats.cpu),
        cpu_user_us: micros(stats.cpu),
        cpu_nr_periods: stats.periods,
        cpu_nr_throttled: stats.throttled,
        cpu_throttled_us: micros(stats.throttled_time),
        memory_usage_bytes: stats.memory_bytes,
        memory_anon_bytes: stats.memory_bytes,
        memory_limit_bytes: stats.memory_limit_bytes,
        memory_oom_kills: stats.out_of_memory,
        pids_current: stats.processes,
        ..Default::default()
    }
}
