//! Containers: their cgroup, files and processes.

pub mod bundle;
pub mod cgroup;
pub mod executor;
pub mod pod_pids;
pub mod privileges;
pub mod process;
pub mod rootfs;
pub mod runtime;
pub mod seccomp;
pub mod spec;

use std::collections::{BTreeMap, HashMap};

use agent_api::rpc::{CreateContainerRequest, CreateExecRequest, Stdio};
use libcontainer::oci_spec::runtime::{Process as OciProcess, Spec};
use tokio::task::JoinSet;

use self::bundle::Bundle;
use self::cgroup::Cgroup;
use self::executor::GuestExecutor;
use self::privileges::Privileges;
use self::process::Process;
use self::rootfs::Rootfs;
use self::seccomp::Filters;
use crate::error::AgentError;
use crate::stdio::{self, AgentEnds, ConsoleSocket, ProcessName, Pumps};
use crate::streams::Streams;

/// What an exec needs when it starts.
#[derive(Debug)]
pub struct ExecPlan {
    process: OciProcess,
    find_home: bool,
    privileges: Privileges,
    stdio: Stdio,
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its init process.
    pub init: Process,
    /// Its other processes.
    pub execs: HashMap<String, Process>,
    /// Execs that have not started.
    pub plans: HashMap<String, ExecPlan>,
    /// Whether its processes are frozen.
    pub paused: bool,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Tasks that live as long as it does.
    pub tasks: JoinSet<()>,
    /// Apply to its execs as well.
    filters: Filters,
    runtime: libcontainer::container::Container,
    /// Kept for its poststop hooks only.
    spec: Option<Spec>,
    /// What remains when the processes are gone; taken by the deletion.
    pub remains: Option<Remains>,
}

/// What a container leaves behind: dropped in this order.
#[derive(Debug)]
pub struct Remains {
    /// Its cgroup.
    pub cgroup: Cgroup,
    _rootfs: Option<Rootfs>,
    bundle: Bundle,
}

impl Remains {
    /// Ends what is left of the container and removes its traces.
    pub async fn remove(&mut self) -> Result<(), AgentError> {
        self.cgroup.remove().await
    }
}

impl Container {
    /// Creates a container; nothing stays behind when that fails.
    pub fn create(
        request: &CreateContainerRequest,
        env: &BTreeMap<String, String>,
        streams: &Streams,
    ) -> Result<Self, AgentError> {
        let id = &request.container_id;
        let wanted = request.stdio.get_or_default();
        let path = cgroup::path_of(id);
        let mut prepared = spec::prepare(&request.spec_json, path, wanted.terminal, env)?;
        let mut bundle = Bundle::create(id)?;
        bundle.mount(&request.mounts)?;
        let rootfs = Rootfs::prepare(id, &mut prepared.spec)?;
        bundle.write_spec(&prepared.spec)?;
        let cgroup = Cgroup::create(id)?;
        let (ends, kept) = stdio::open(wanted, bundle.path())?;
        let (executor, report) = GuestExecutor::new(prepared.find_home, prepared.privileges)?;
        let (runtime, pid, console) = runtime::create(id, &bundle, executor, ends)?;
        let mut remains = Remains {
            cgroup,
            _rootfs: rootfs,
            bundle,
        };
        let ends = match attach(console, kept, wanted) {
            Ok(ends) => ends,
            Err(e) => {
                tokio::spawn(async move { remains.remove().await });
                return Err(e);
            }
        };
        let name = ProcessName {
            container: id.clone(),
            exec: String::new(),
        };
        let mut init = Process::created(name, command(prepared.spec.process().as_ref()), Some(pid));
        init.pumps = Some(Pumps::start(init.name(), ends, wanted.terminal, streams));
        init.report = Some(report);
        Ok(Self {
            init,
            execs: HashMap::new(),
            plans: HashMap::new(),
            paused: false,
            deleting: false,
            tasks: JoinSet::new(),
            filters: prepared.filters,
            runtime,
            spec: Some(prepared.spec).filter(|s| s.hooks().is_some()),
            remains: Some(remains),
        })
    }

    /// Lets the init process execute its program.
    pub fn start(&mut self) -> Result<(), AgentError> {
        runtime::start(&mut self.runtime)
    }

    /// Adds a process.
    pub fn add_exec(
        &mut self,
        request: &CreateExecRequest,
        env: &BTreeMap<String, String>,
    ) -> Result<(), AgentError> {
        let id = &request.exec_id;
        let stdio = request.stdio.get_or_default().clone();
        let (process, find_home, privileges) =
            spec::prepare_exec(&request.process_json, stdio.terminal, env, &self.filters)?;
        if !self.init.is_running() {
            return Err(self.init.wrong_state("running"));
        }
        let name = ProcessName {
            container: request.container_id.clone(),
            exec: id.clone(),
        };
        if self.execs.contains_key(id) {
            return Err(AgentError::Exists(format!("exec {name}")));
        }
        let exec = Process::created(name, command(Some(&process)), None);
        self.execs.insert(id.clone(), exec);
        let plan = ExecPlan {
            process,
            find_home,
            privileges,
            stdio,
        };
        self.plans.insert(id.clone(), plan);
        Ok(())
    }

    /// Runs an added process; returns its pid once its program executes.
    pub fn start_exec(&mut self, exec_id: &str, streams: &Streams) -> Result<i32, AgentError> {
        let id = self.init.name().container.clone();
        if !self.init.is_running() {
            return Err(self.init.wrong_state("running"));
        }
        if self.paused {
            return Err(AgentError::State {
                what: format!("container {id}"),
                is: "paused",
                needs: "running",
            });
        }
        let missing = || AgentError::NoExec(id.clone(), exec_id.to_owned());
        let exec = self.execs.get_mut(exec_id).ok_or_else(missing)?;
        let Some(plan) = self.plans.remove(exec_id) else {
            return Err(exec.wrong_state("created"));
        };
        let remains = self.remains.as_ref();
        let bundle = remains.map(|r| &r.bundle).ok_or_else(missing)?;
        match run_exec(&id, bundle, &exec.command, &plan) {
            Ok((pid, ends)) => {
                let terminal = plan.stdio.terminal;
                exec.pumps = Some(Pumps::start(exec.name(), ends, terminal, streams));
                exec.started(pid);
                Ok(pid)
            }
            Err(e) => {
                exec.pumps = Some(Pumps::refuse(exec.name(), &plan.stdio, streams));
                exec.start_failed(&e);
                Err(e)
            }
        }
    }

    /// A process by exec id; empty is the init process.
    pub fn process(&mut self, exec_id: &str) -> Result<&mut Process, AgentError> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        let container = &self.init.name().container;
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| AgentError::NoExec(container.clone(), exec_id.to_owned()))
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> Result<&Cgroup, AgentError> {
        let remains = self.remains.as_ref();
        remains
            .map(|r| &r.cgroup)
            .ok_or_else(|| AgentError::NoContainer(self.init.name().container.clone()))
    }

    /// Runs the hooks that follow its end.
    pub fn run_poststop(&self) -> Result<(), AgentError> {
        match &self.spec {
            Some(spec) => runtime::run_poststop(&self.runtime, spec),
            None => Ok(()),
        }
    }
}

/// Executes a plan.
fn run_exec(
    id: &str,
    bundle: &Bundle,
    command: &str,
    plan: &ExecPlan,
) -> Result<(i32, AgentEnds), AgentError> {
    let (ends, kept) = stdio::open(&plan.stdio, bundle.path())?;
    let (executor, report) = GuestExecutor::new(plan.find_home, plan.privileges.clone())?;
    let file = bundle.write("exec.json", &plan.process)?;
    let built = runtime::exec(id, bundle, &file, executor, ends);
    // The report says why in a form that the host can act on.
    report.failure(command)?;
    let (pid, console) = built?;
    let ends = attach(console, kept, &plan.stdio).inspect_err(|_| {
        // Gone already is fine; reaped as a child nobody knows.
        let _ = crate::sys::kill(pid, libc::SIGKILL);
    })?;
    Ok((pid, ends))
}

/// The agent's ends of a new process.
fn attach(
    console: Option<ConsoleSocket>,
    files: AgentEnds,
    wanted: &Stdio,
) -> Result<AgentEnds, AgentError> {
    match console {
        Some(socket) => socket
            .receive(wanted)
            .map_err(AgentError::io("receiving the terminal")),
        None => Ok(files),
    }
}

fn command(process: Option<&OciProcess>) -> String {
    let args = process.and_then(|p| p.args().as_ref());
    args.and_then(|a| a.first()).cloned().unwrap_or_default()
}
