//! What the agent knows and does, behind the RPC service.
//!
//! One thread runs everything, so a function without an await is atomic. The lock is never
//! held across one.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::rpc::{
    CreateContainerRequest, CreateExecRequest, Event, ExitStatus, Network, ProcessRef, Ready,
    SetupSandboxRequest, SignalProcessRequest, StatsResponse, event,
};
use libcontainer::oci_spec::runtime::LinuxResources;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::clock;
use crate::container::Container;
use crate::container::process::{Exit, Process};
use crate::error::{AgentError, check_id};
use crate::events::{self, Events};
use crate::sandbox::Sandbox;
use crate::stdio::ProcessName;
use crate::streams::Streams;
use crate::sys::{self, RawStatus};

/// Highest signal number of Linux.
const MAX_SIGNAL: u32 = 64;

#[derive(Debug, Default)]
struct State {
    sandbox: Option<Sandbox>,
    containers: HashMap<String, Container>,
    pids: HashMap<i32, ProcessName>,
    events: Events,
}

/// The agent.
#[derive(Debug)]
pub struct Agent {
    state: Mutex<State>,
    streams: Streams,
    ready: Ready,
}

impl State {
    fn container(&mut self, id: &str) -> Result<&mut Container, AgentError> {
        self.containers
            .get_mut(id)
            .filter(|c| !c.deleting)
            .ok_or_else(|| AgentError::NoContainer(id.to_owned()))
    }

    fn process(&mut self, name: &ProcessName) -> Result<&mut Process, AgentError> {
        self.container(&name.container)?.process(&name.exec)
    }

    fn environment(&self) -> BTreeMap<String, String> {
        self.sandbox
            .as_ref()
            .map(Sandbox::environment)
            .unwrap_or_default()
    }
}

/// Checks the ids of a request.
fn name_of(process: &ProcessRef) -> Result<ProcessName, AgentError> {
    check_id("container_id", &process.container_id)?;
    if !process.exec_id.is_empty() {
        check_id("exec_id", &process.exec_id)?;
    }
    Ok(ProcessName {
        container: process.container_id.clone(),
        exec: process.exec_id.clone(),
    })
}

impl Agent {
    /// An agent without containers. `ready` is what a new subscriber is told first.
    pub fn new(streams: Streams, ready: Ready) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            streams,
            ready,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a request leaves the state as consistent as its last statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribes to events.
    pub fn subscribe(&self) -> mpsc::Receiver<Event> {
        let mut state = self.lock();
        let processes = state
            .containers
            .values()
            .flat_map(|c| c.execs.values().chain([&c.init]));
        let mut exits: Vec<_> = processes
            .filter(|p| p.published)
            .filter_map(|p| p.exit().map(|e| (e, p.name())))
            .collect();
        exits.sort_by_key(|(exit, _)| exit.at_ns);
        let mut replay = vec![events::wrap(event::Kind::Ready(self.ready.clone()))];
        replay.extend(
            exits
                .into_iter()
                .map(|(exit, name)| events::exit(name, exit.into())),
        );
        state.events.subscribe(replay)
    }

    /// Prepares the guest for its pod.
    pub fn setup_sandbox(&self, request: &SetupSandboxRequest) -> Result<(), AgentError> {
        let mut state = self.lock();
        match &mut state.sandbox {
            Some(sandbox) => sandbox.repeat(request),
            none => {
                *none = Some(Sandbox::setup(request)?);
                info!(hostname = request.hostname, "sandbox set up");
                Ok(())
            }
        }
    }

    /// Makes the pod's network another.
    pub fn update_network(&self, wanted: &Network) -> Result<(), AgentError> {
        match &mut self.lock().sandbox {
            Some(sandbox) => sandbox.update_network(wanted),
            None => Err(AgentError::State {
                what: "the sandbox".to_owned(),
                is: "not set up",
                needs: "set up",
            }),
        }
    }

    /// Creates a container; returns the pid of its init process.
    pub fn create_container(
        self: &Arc<Self>,
        request: &CreateContainerRequest,
    ) -> Result<u32, AgentError> {
        let id = &request.container_id;
        check_id("container_id", id)?;
        let mut state = self.lock();
        let env = state.environment();
        let container = match state.containers.entry(id.clone()) {
            Entry::Occupied(_) => return Err(AgentError::Exists(format!("container {id}"))),
            Entry::Vacant(entry) => {
                let mut container = Container::create(request, &env, &self.streams)?;
                self.watch_oom(&mut container)?;
                entry.insert(container)
            }
        };
        let pid = container.init.pid().unwrap_or_default();
        let name = container.init.name().clone();
        state.pids.insert(pid, name);
        info!(container = %id, pid, "container created");
        Ok(pid.unsigned_abs())
    }

    /// Pushes an event whenever the kernel kills in the container for want of memory.
    fn watch_oom(self: &Arc<Self>, container: &mut Container) -> Result<(), AgentError> {
        let Some(oom) = container.cgroup()?.oom() else {
            return Ok(());
        };
        let me = Arc::clone(self);
        let id = container.init.name().container.clone();
        container.tasks.spawn(async move {
            while oom.changed().await.is_ok() {
                if let (_, true) = oom.check() {
                    me.lock().events.publish(events::oom(&id));
                }
            }
        });
        Ok(())
    }

    /// Adds a process to a running container.
    pub fn create_exec(&self, request: &CreateExecRequest) -> Result<(), AgentError> {
        check_id("container_id", &request.container_id)?;
        check_id("exec_id", &request.exec_id)?;
        let mut state = self.lock();
        let env = state.environment();
        state
            .container(&request.container_id)?
            .add_exec(request, &env)
    }

    /// Starts a created process; returns its pid once its program runs.
    pub async fn start(self: &Arc<Self>, process: &ProcessRef) -> Result<u32, AgentError> {
        let name = name_of(process)?;
        let started = if name.exec.is_empty() {
            // A task of its own: a host that stops waiting must not leave it half done.
            let task = tokio::spawn(Arc::clone(self).start_init(name.clone()));
            task.await
                .unwrap_or_else(|e| Err(AgentError::Internal(e.to_string())))
        } else {
            self.start_exec(&name)
        };
        match &started {
            Ok(pid) => info!(container = %name.container, exec = name.exec, pid, "process started"),
            Err(e) => info!(container = %name.container, exec = name.exec, "not started: {e}"),
        }
        Ok(started?.unsigned_abs())
    }

    async fn start_init(self: Arc<Self>, name: ProcessName) -> Result<i32, AgentError> {
        let (pid, report, command) = {
            let mut state = self.lock();
            let container = state.container(&name.container)?;
            let pid = container.init.starting()?;
            if let Err(e) = container.start() {
                // Waiting for a word that will not come: the reaper finds it.
                let _ = sys::kill(pid, libc::SIGKILL);
                drop(state);
                self.start_failed(&name, &e);
                return Err(e);
            }
            let init = &mut container.init;
            (pid, init.report.take(), init.command.clone())
        };
        let report = match report {
            Some(report) => report.wait(&command).await,
            None => Ok(()),
        };
        if let Err(e) = report {
            self.start_failed(&name, &e);
            return Err(e);
        }
        let ended = self.lock().process(&name)?.started(pid);
        if let Some(exit) = ended {
            self.tell_exit(name, exit);
        }
        Ok(pid)
    }

    fn start_exec(&self, name: &ProcessName) -> Result<i32, AgentError> {
        let mut state = self.lock();
        let container = state.container(&name.container)?;
        let pid = container.start_exec(&name.exec, &self.streams)?;
        state.pids.insert(pid, name.clone());
        Ok(pid)
    }

    /// Records an init process that never ran, and closes its streams.
    fn start_failed(&self, name: &ProcessName, e: &AgentError) {
        let mut state = self.lock();
        let Ok(process) = state.process(name) else {
            return;
        };
        process.start_failed(e);
        if let Some(pumps) = &mut process.pumps {
            // The pumps end by themselves; nobody waits for them.
            drop(pumps.process_exited());
        }
    }

    /// Takes note of a child that the kernel reports as ended.
    pub fn child_ended(self: &Arc<Self>, pid: i32, status: RawStatus) {
        let mut state = self.lock();
        // Others are the runtime's helpers and orphans.
        let Some(name) = state.pids.remove(&pid) else {
            return;
        };
        // The end of a container that is being deleted is the deletion's answer.
        let Ok(container) = state.container(&name.container) else {
            return;
        };
        let oom = container.cgroup().ok().and_then(|c| c.oom());
        let (kills, new_kill) = oom.map_or((0, false), |o| o.check());
        let exit = Exit {
            code: status.code(),
            at_ns: clock::now_ns(),
            oom_killed: kills > 0,
        };
        let tell = container.process(&name.exec).is_ok_and(|p| p.ended(exit));
        if new_kill {
            state.events.publish(events::oom(&name.container));
        }
        drop(state);
        if tell {
            self.tell_exit(name, exit);
        }
    }

    /// Publishes an exit after the process's last output.
    fn tell_exit(self: &Arc<Self>, name: ProcessName, exit: Exit) {
        let drained = {
            let mut state = self.lock();
            let pumps = state.process(&name).ok().and_then(|p| p.pumps.as_mut());
            pumps.map(crate::stdio::Pumps::process_exited)
        };
        let me = Arc::clone(self);
        tokio::spawn(async move {
            if let Some(drained) = drained {
                drained.await;
            }
            let mut state = me.lock();
            if let Ok(process) = state.process(&name) {
                process.published = true;
            }
            info!(container = %name.container, exec = name.exec, code = exit.code, "process exited");
            state.events.publish(events::exit(&name, exit.into()));
        });
    }

    /// Sends a signal to one process or to all of a container.
    pub fn signal(&self, request: &SignalProcessRequest) -> Result<(), AgentError> {
        let name = name_of(request.process.get_or_default())?;
        let signal = request.signal;
        if !(1..=MAX_SIGNAL).contains(&signal) {
            return Err(AgentError::invalid(
                "signal",
                format!("{signal} is not between 1 and {MAX_SIGNAL}"),
            ));
        }
        if request.all && !name.exec.is_empty() {
            return Err(AgentError::invalid("all", "is for the init process only"));
        }
        let signal = signal.cast_signed();
        let mut state = self.lock();
        let container = state.container(&name.container)?;
        if request.all {
            let cgroup = container.cgroup()?;
            if signal == libc::SIGKILL {
                return cgroup.kill();
            }
            for pid in cgroup.pids()? {
                // One that ended in between has no use for the signal.
                let _ = sys::kill(pid.cast_signed(), signal);
            }
            return Ok(());
        }
        let process = container.process(&name.exec)?;
        let Some(pid) = process.pid() else {
            return Err(match process.exit() {
                Some(_) => AgentError::Exited(name.to_string()),
                None => process.wrong_state("running"),
            });
        };
        sys::kill(pid, signal).map_err(AgentError::io(format!("signal {signal} to {name}")))
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, process: &ProcessRef, width: u32, height: u32) -> Result<(), AgentError> {
        let name = name_of(process)?;
        let mut state = self.lock();
        let process = state.process(&name)?;
        if process.exit().is_some() {
            return Err(AgentError::Exited(name.to_string()));
        }
        let pumps = process.pumps.as_ref();
        let resized = pumps.map_or(Ok(false), |p| p.resize(width, height));
        match resized.map_err(AgentError::io(format!("resizing {name}")))? {
            true => Ok(()),
            false if process.is_created() => Err(process.wrong_state("running")),
            false => Err(AgentError::invalid(
                "process",
                format!("{name} has no terminal"),
            )),
        }
    }

    /// Closes a process's standard input behind what was sent.
    pub fn close_stdin(&self, process: &ProcessRef) -> Result<(), AgentError> {
        let name = name_of(process)?;
        let mut state = self.lock();
        if let Some(pumps) = &state.process(&name)?.pumps {
            pumps.close_stdin();
        }
        Ok(())
    }

    /// Forgets an ended process, or one that never started; with the init process, the
    /// whole container.
    pub async fn delete(self: &Arc<Self>, process: &ProcessRef) -> Result<ExitStatus, AgentError> {
        let name = name_of(process)?;
        if name.exec.is_empty() {
            let task = tokio::spawn(Arc::clone(self).delete_container(name.container));
            return task
                .await
                .unwrap_or_else(|e| Err(AgentError::Internal(e.to_string())));
        }
        let mut state = self.lock();
        let container = state.container(&name.container)?;
        let exec = container.process(&name.exec)?;
        let status = deletable(exec)?;
        container.execs.remove(&name.exec);
        container.plans.remove(&name.exec);
        Ok(status)
    }

    async fn delete_container(self: Arc<Self>, id: String) -> Result<ExitStatus, AgentError> {
        let (status, mut remains) = {
            let mut state = self.lock();
            let container = state.container(&id)?;
            let status = deletable(&container.init)?;
            container.deleting = true;
            container.tasks.abort_all();
            (status, container.remains.take())
        };
        if let Some(remains) = &mut remains {
            let removed = remains.remove().await;
            if let Err(e) = removed {
                let mut state = self.lock();
                if let Some(container) = state.containers.get_mut(&id) {
                    container.deleting = false;
                }
                return Err(e);
            }
        }
        let mut state = self.lock();
        state.pids.retain(|_, name| name.container != id);
        if let Some(container) = state.containers.remove(&id)
            && let Err(e) = container.run_poststop()
        {
            warn!(container = id, "{e}");
        }
        drop(state);
        drop(remains);
        info!(container = id, "container deleted");
        Ok(status)
    }

    /// Pids of everything in a container.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, AgentError> {
        self.lock().container(id)?.cgroup()?.pids()
    }

    /// Usage of a container.
    pub fn stats(&self, id: &str) -> Result<StatsResponse, AgentError> {
        Ok(self.lock().container(id)?.cgroup()?.stats())
    }

    /// Freezes or continues a container.
    pub async fn set_paused(&self, id: &str, paused: bool) -> Result<(), AgentError> {
        let frozen = {
            let mut state = self.lock();
            let container = state.container(id)?;
            if paused && !container.init.is_running() {
                return Err(container.init.wrong_state("running"));
            }
            let frozen = container.cgroup()?.freeze(paused)?;
            container.paused = paused;
            frozen
        };
        frozen.await
    }

    /// Sets new limits for a container.
    pub fn update(&self, id: &str, resources: &[u8]) -> Result<(), AgentError> {
        let parsed: LinuxResources = serde_json::from_slice(resources)
            .map_err(|e| AgentError::invalid("resources_json", e))?;
        self.lock().container(id)?.cgroup()?.update(&parsed)
    }
}

/// The status to answer a deletion with, if the process may be deleted.
fn deletable(process: &Process) -> Result<ExitStatus, AgentError> {
    if let Some(exit) = process.exit() {
        return Ok(exit.into());
    }
    if !process.is_created() {
        return Err(process.wrong_state("stopped"));
    }
    // Never started: it ends with the cgroup, as if killed.
    Ok(ExitStatus {
        code: 128 + libc::SIGKILL.unsigned_abs(),
        exited_at_ns: clock::now_ns(),
        ..Default::default()
    })
}
