//! From created to gone.

use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::DropGuard;
use tracing::{Instrument, Span, error, info, info_span, warn};
use vmm_core::vm::{ExitReason, Vm, VmError};

use super::container::Container;
use super::disks::DiskSlots;
use super::network::{Follower, PodNetwork};
use super::process::{Exit, KILLED, Process};
use super::snapshot::SavedContainer;
use super::{Machine, Network, Phase, Pod, PodError, Result, lock, nanoseconds, phase};
use crate::agent::{AgentEvent, Connected, Limits};
use crate::backend::{Built, MachineRequest};
use crate::causes::with_causes;
use crate::events::TaskEventKind;
use crate::pod::MachineSize;

/// Bytes that seed the guest's random pool.
const ENTROPY_BYTES: usize = 64;

/// Exit status of a pod that never became ready.
const NEVER_READY: u32 = 255;

impl Pod {
    /// Begins a start, which only one caller can.
    ///
    /// # Errors
    /// The pod was started before or is being stopped.
    pub fn begin_start(&self) -> Result<()> {
        if self.advance(|phase| *phase == Phase::Created, Phase::Starting) {
            return Ok(());
        }
        Err(self.wrong_phase("start"))
    }

    /// After [`Pod::begin_start`]: boots the pod's machine and waits for its agent.
    ///
    /// # Errors
    /// The machine or its agent failed, or the start was given up. The machine is gone then
    /// and the pod is of no further use.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        info!(pod = self.id(), "starting");
        let mut vm = None;
        let booted = self.boot(&mut vm).instrument(self.span()).await;
        self.started(booted, vm).await
    }

    /// Follows the guest of a pod that is up; cleans up after one that is not.
    pub(super) async fn started(
        self: &Arc<Self>,
        up: Result<mpsc::Receiver<AgentEvent>>,
        vm: Option<Arc<dyn Vm>>,
    ) -> Result<()> {
        match up {
            Ok(events) => {
                let watcher = Arc::clone(self).watch(events);
                tokio::spawn(watcher.instrument(self.span()));
                self.follow_network();
                info!(pod = self.id(), "ready");
                self.describe_for_next_daemon().await;
                Ok(())
            }
            Err(e) => {
                if let Some(vm) = vm {
                    if let Some(tail) = vm.console_tail() {
                        error!("end of the guest's console:\n{}", tail.trim_end());
                    }
                    self.end_machine(vm).await;
                }
                self.fail_start(&e).await;
                Err(e)
            }
        }
    }

    pub(super) fn span(&self) -> Span {
        info_span!("pod", pod = self.id())
    }

    /// Ends a start that cannot go on.
    pub async fn fail_start(&self, error: &PodError) {
        let reason = with_causes(error);
        error!(pod = self.id(), "start failed: {reason}");
        self.settle(Exit::now(NEVER_READY), &reason).await;
    }

    /// Makes a start that is under way fail when the guard is dropped.
    #[must_use]
    pub fn give_up_start_on_drop(&self) -> DropGuard {
        self.give_up.clone().drop_guard()
    }

    async fn boot(&self, slot: &mut Option<Arc<dyn Vm>>) -> Result<mpsc::Receiver<AgentEvent>> {
        let request = self.machine_request()?;
        // Building is not given up half way: what is being built has no owner yet.
        tokio::select! {
            biased;
            () = self.give_up.cancelled() => return Err(PodError::Cancelled("the start")),
            () = self.environment.backend.prepare(&request) => {}
        }
        let built = self.environment.backend.build(request).await;
        let Built { vm, met } = built.map_err(|e| self.vm_error(e))?;
        *slot = Some(Arc::clone(&vm));
        self.bring_up(&vm, met, &[]).await
    }

    /// Lets a machine run, sets its guest up, and takes over the containers that run in it
    /// already.
    pub(super) async fn bring_up(
        &self,
        vm: &Arc<dyn Vm>,
        met: Option<Connected>,
        containers: &[SavedContainer],
    ) -> Result<mpsc::Receiver<AgentEvent>> {
        self.connect_network(vm.as_ref()).await?;
        self.meet(vm, met, containers, true).await
    }

    /// Waits for the agent of a machine that runs, or is to be started, unless it has been `met`.
    pub(super) async fn meet(
        &self,
        vm: &Arc<dyn Vm>,
        met: Option<Connected>,
        containers: &[SavedContainer],
        start: bool,
    ) -> Result<mpsc::Receiver<AgentEvent>> {
        let up = async {
            let backend = &self.environment.backend;
            let agent = match met {
                Some(connected) => Box::pin(std::future::ready(Ok(connected))),
                None => backend
                    .agent(self.id(), vm.as_ref(), self.limits())
                    .map_err(|e| self.vm_error(e))?,
            };
            if start {
                vm.start().await.map_err(|e| self.vm_error(e))?;
            }
            self.pin(vm.as_ref());
            // Meanwhile the guest boots.
            let accounted = tokio::task::spawn_blocking(self.account_for(vm.as_ref()));
            let connected = agent.await?;
            let _ = accounted.await;
            vm.mark_phase(phase::AGENT_READY);
            connected.client.setup_sandbox(self.setup()).await?;
            vm.mark_phase(phase::SANDBOX_SET_UP);
            if let Some(Network::Connected(network)) = lock(&self.network).as_mut() {
                network.forward(Arc::downgrade(vm), self.limits().connect);
            }
            let machine = Arc::new(Machine {
                vm: Arc::clone(vm),
                agent: connected.client,
                online_cpus: connected.ready.cpus.into(),
                ready: connected.ready,
                disks: DiskSlots::restored(containers.iter().flat_map(|c| c.disks.clone())),
            });
            for saved in containers {
                self.adopt(&machine, saved).await?;
            }
            Ok::<_, PodError>((machine, connected.events))
        };
        let mut exited = vm.exited();
        let (machine, events) = tokio::select! {
            biased;
            () = self.give_up.cancelled() => return Err(PodError::Cancelled("the start")),
            reason = ended(&mut exited) => return Err(self.vm_error(VmError::Exited(reason))),
            up = up => up?,
        };
        info!(
            kernel = machine.ready.kernel_release,
            agent = machine.ready.agent_version,
            "guest is up"
        );
        *lock(&self.machine) = Some(machine);
        if self.advance(|phase| *phase == Phase::Starting, Phase::Ready) {
            return Ok(events);
        }
        lock(&self.machine).take();
        Err(PodError::Cancelled("the start"))
    }

    pub(super) fn machine_request(&self) -> Result<MachineRequest> {
        let linux = self.request.config.linux.as_ref();
        let size = MachineSize::for_pod(
            linux.and_then(|linux| linux.resources.as_ref()),
            linux.and_then(|linux| linux.overhead.as_ref()),
            &self.environment.vm,
        )?;
        let share = lock(&self.share)
            .as_ref()
            .map(|share| share.path().to_owned())
            .ok_or_else(|| self.wrong_phase("start"))?;
        Ok(MachineRequest {
            pod: self.id().to_owned(),
            vcpus: size.vcpus,
            memory_bytes: size.memory_bytes,
            share,
            dir: self.dir.clone(),
            limits: linux.and_then(|linux| linux.resources.clone()),
            disks: Vec::new(),
            netns: self.request.netns.clone(),
        })
    }

    /// Plugs the interfaces of the pod's namespace into the machine.
    pub(super) async fn connect_network(&self, vm: &dyn Vm) -> Result<()> {
        let Some(path) = self.request.netns.clone() else {
            return Ok(());
        };
        if self.environment.backend.enters_namespace() {
            return Ok(());
        }
        if vm.net_slots() == 0 {
            warn!("the machine has no network slots: the pod has loopback only");
            return Ok(());
        }
        let slots = vm.net_slots();
        let connected = tokio::task::spawn_blocking(move || PodNetwork::connect(&path, slots))
            .await
            .unwrap_or(Err(PodError::Cancelled("connecting the network")));
        let (network, taps) = connected?;
        self.note_network(&network);
        *lock(&self.network) = Some(Network::Connected(network));
        if taps.is_empty() {
            warn!("the pod's network namespace has no interface: the pod has loopback only");
        }
        for (slot, tap) in taps.into_iter().enumerate() {
            let attached = vm.attach_nic(slot, tap).await;
            attached.map_err(|e| self.vm_error(e))?;
        }
        Ok(())
    }

    /// Keeps what others have to know of the network, whoever has it.
    pub(super) fn note_network(&self, network: &PodNetwork) {
        let mut note = lock(&self.network_note);
        note.description.clone_from(network.describe());
        note.connected = network.connected();
    }

    /// From now on the guest's network changes with the namespace.
    fn follow_network(self: &Arc<Self>) {
        let mut network = lock(&self.network);
        // Taken away already by a stop, or there is none.
        if let Some(Network::Connected(connected)) = network.take() {
            *network = Some(Network::Followed(Follower::start(self, connected)));
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits::from(&self.environment.timeouts)
    }

    pub(super) fn setup(&self) -> rpc::SetupSandboxRequest {
        let linux = self.request.config.linux.as_ref();
        let files = super::PodFiles {
            hostname: self.request.hostname(),
            dns: self.request.config.dns_config.as_ref(),
            debug_shell: None,
        };
        rpc::SetupSandboxRequest {
            hostname: self.request.hostname().to_owned(),
            time_ns: nanoseconds(std::time::SystemTime::now()),
            entropy: entropy(),
            mounts: vec![rpc::Mount {
                source: agent_api::SHARE_TAG.to_owned(),
                target: agent_api::SHARE_DIR.to_owned(),
                fstype: "virtiofs".to_owned(),
                ..Default::default()
            }],
            sysctls: linux
                .map(|linux| linux.sysctls.clone().into_iter().collect())
                .unwrap_or_default(),
            environment: self
                .environment
                .backend
                .guest_environment()
                .into_iter()
                .collect(),
            resolv_conf: files.resolv_conf(),
            network: Some(lock(&self.network_note).description.clone()).into(),
            ..Default::default()
        }
    }

    /// Follows what happens in the guest until its machine ends.
    pub(super) async fn watch(self: Arc<Self>, mut events: mpsc::Receiver<AgentEvent>) {
        let Ok(machine) = self.machine() else {
            return;
        };
        let mut exited = machine.vm.exited();
        drop(machine);
        let reason = loop {
            tokio::select! {
                reason = ended(&mut exited) => break reason,
                Some(event) = events.recv() => self.dispatch(event),
            }
        };
        while let Ok(event) = events.try_recv() {
            self.dispatch(event);
        }
        let stopped = self.advance(|phase| *phase == Phase::Ready, Phase::Stopping);
        let code = if stopped {
            warn!("the machine ended: {reason}");
            KILLED
        } else {
            info!("stopped");
            0
        };
        let machine = lock(&self.machine).take();
        if let Some(machine) = machine {
            self.end_machine(Arc::clone(&machine.vm)).await;
        }
        self.settle(Exit::now(code), &reason.to_string()).await;
    }

    fn dispatch(&self, event: AgentEvent) {
        match event {
            AgentEvent::Exit { process, code } => {
                if let Ok(container) = self.container(&process.container_id)
                    && let Ok(process) = container.process(&process.exec_id)
                {
                    self.process_exited(&container, &process, code);
                }
            }
            AgentEvent::Oom { container_id } => {
                warn!(container = container_id, "out of memory");
                if let Ok(container) = self.container(&container_id) {
                    self.tell(&container, TaskEventKind::Oom);
                }
            }
        }
    }

    /// Records the end of a process, once.
    fn process_exited(&self, container: &Container, process: &Process, code: u32) {
        let exit = Exit::now(code);
        if !process.exited(exit) {
            return;
        }
        if let (true, Ok(machine)) = (process.id().exec_id.is_empty(), self.machine()) {
            machine.vm.mark_phase(phase::EXIT_SEEN);
        }
        let (what, id) = process.what();
        info!(
            pod = self.id(),
            container = container.id(),
            "{what} {id} exited with {code}"
        );
        self.tell(
            container,
            TaskEventKind::Exit {
                exec_id: process.id().exec_id.clone(),
                pid: process.pid(),
                exit,
            },
        );
    }

    /// Stops the machine; `limit` replaces the configured time. Idempotent, and safe while
    /// the pod starts: the start is given up.
    ///
    /// # Errors
    /// The machine did not end in time.
    pub async fn stop(self: &Arc<Self>, limit: Option<Duration>) -> Result<()> {
        let limit = limit.unwrap_or(self.environment.timeouts.stop);
        self.give_up.cancel();
        if self.advance(|phase| *phase == Phase::Created, Phase::Stopping) {
            self.settle(Exit::now(0), "never started").await;
        } else if self.advance(|phase| *phase == Phase::Ready, Phase::Stopping) {
            info!(pod = self.id(), "stopping");
            self.end(limit, true).await?;
        }
        // A start that is given up, or another stop, needs its time as well.
        let settled = limit.saturating_mul(2);
        if timeout(settled, self.wait()).await.is_ok() {
            return Ok(());
        }
        self.end(limit, false).await?;
        timeout(settled, self.wait()).await.map(drop).map_err(|_| {
            self.vm_error(VmError::Deadline {
                what: "stopping the sandbox",
                limit: settled,
            })
        })
    }

    /// Ends the machine, if there is one, even when the caller does not wait for it.
    pub(super) async fn end(self: &Arc<Self>, limit: Duration, gracefully: bool) -> Result<()> {
        let Ok(machine) = self.machine() else {
            return Ok(());
        };
        let pod = Arc::clone(self);
        let ending = async move {
            if gracefully {
                pod.power_off(&machine, limit).await;
            }
            machine.vm.stop(limit).await
        };
        match self.operations.spawn(ending).await {
            Ok(Err(e)) => Err(self.vm_error(e)),
            _ => Ok(()),
        }
    }

    /// Lets the guest flush and power off.
    async fn power_off(&self, machine: &Machine, limit: Duration) {
        let mut exited = machine.vm.exited();
        let graceful = async {
            if let Err(e) = machine.agent.shutdown().await {
                warn!(pod = self.id(), "{e}");
                return;
            }
            ended(&mut exited).await;
        };
        if timeout(limit, graceful).await.is_err() {
            warn!(pod = self.id(), "the guest did not power off in {limit:?}");
        }
    }

    /// Waits until the pod's machine has ended and everything it held is released.
    pub async fn wait(&self) -> Exit {
        let mut phases = self.phase.subscribe();
        loop {
            if let Phase::NotReady { exit, .. } = &*phases.borrow_and_update() {
                return *exit;
            }
            if phases.changed().await.is_err() {
                return Exit::now(KILLED);
            }
        }
    }

    /// Ends the machine and frees it where blocking is allowed.
    pub(super) async fn end_machine(&self, vm: Arc<dyn Vm>) {
        if let Err(e) = vm.stop(self.environment.timeouts.stop).await {
            error!(
                pod = self.id(),
                "cannot stop the machine: {}",
                with_causes(&e)
            );
        }
        // Dropping joins threads.
        let _ = tokio::task::spawn_blocking(move || drop(vm)).await;
        if let Some(cgroup) = lock(&self.cgroup).as_mut() {
            cgroup.remove();
        }
    }

    /// Ends everything that ran in the machine, releases the host's mounts and says so.
    async fn settle(&self, exit: Exit, reason: &str) {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let mut storages = Vec::new();
        for container in &containers {
            for process in container.processes() {
                self.process_exited(container, &process, KILLED);
            }
            storages.extend(container.take_storage());
        }
        // The machine has ended, and with it the taps.
        let network = lock(&self.network).take();
        let connected = match network {
            Some(Network::Connected(network)) => Some(network),
            Some(Network::Followed(follower)) => {
                follower.end().await;
                None
            }
            None => None,
        };
        let _ = tokio::task::spawn_blocking(move || {
            drop(storages);
            drop(connected);
        })
        .await;
        self.phase.send_if_modified(|phase| {
            if matches!(phase, Phase::NotReady { .. }) {
                return false;
            }
            *phase = Phase::NotReady {
                exit,
                reason: reason.to_owned(),
            };
            true
        });
    }

    /// Stops the pod and releases all the host holds for it, its folder included.
    ///
    /// # Errors
    /// As for [`Pod::stop`]; the host's resources are kept then, for another try.
    pub async fn shutdown(self: &Arc<Self>) -> Result<()> {
        self.stop(None).await?;
        self.operations.close();
        let limit = self.environment.timeouts.stop;
        if timeout(limit, self.operations.wait()).await.is_err() {
            warn!(pod = self.id(), "operations outlive the sandbox");
        }
        let containers = std::mem::take(&mut *lock(&self.containers));
        let share = lock(&self.share).take();
        let folder = lock(&self.folder).take();
        let cgroup = lock(&self.cgroup).take();
        let _ = tokio::task::spawn_blocking(move || {
            drop(containers);
            drop(share);
            drop(folder);
            drop(cgroup);
        })
        .await;
        Ok(())
    }

    pub(super) fn advance(&self, from: impl FnOnce(&Phase) -> bool, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let moves = from(phase);
            if moves {
                *phase = to;
            }
            moves
        })
    }
}

/// Waits for the end of a VM.
async fn ended(exited: &mut tokio::sync::watch::Receiver<Option<ExitReason>>) -> ExitReason {
    match exited.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or(ExitReason::Stopped),
        Err(_) => ExitReason::Stopped,
    }
}

/// Fresh random bytes from the host.
fn entropy() -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![0; ENTROPY_BYTES];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    if read.is_err() {
        // The guest then relies on its own sources.
        bytes.clear();
    }
    bytes
}
