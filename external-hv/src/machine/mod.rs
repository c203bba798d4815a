//! [`ExternalVm`]: a VM whose VMM is another process.

mod vm;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::panic_words;
use vmm_core::vm::{ExitReason, PhaseReached, Vm as _, VmError, VmSize};

use crate::capability::Capability;
use crate::hypervisor::{
    Control, GuestEnd, GuestVsock, HvError, Hypervisor, Layout, MachineSpec, Nic, Started,
};
use crate::supervisor::{Ended, Job, ShareJob, Supervisor, VsockJob};
use crate::vsock::Ports;

/// Address of every guest; nothing is routed by it.
const GUEST_CID: u32 = 3;
/// From a VMM's hanging up to its end.
const HANG_UP: Duration = Duration::from_secs(1);
/// Bytes of console output told in errors.
const TAIL_BYTES: u64 = 8 << 10;

/// A VM whose VMM is another process. Dropping it ends both.
#[derive(Debug)]
pub struct ExternalVm {
    shared: Arc<Shared>,
    /// Cards plugged in before the VMM was started.
    nics: Mutex<Vec<Nic>>,
    /// Host ports that are listened on.
    ports: Ports,
    /// The supervisor's program.
    program: PathBuf,
}

/// What outlives the [`ExternalVm`] until its processes have ended.
#[derive(Debug)]
struct Shared {
    hypervisor: Arc<dyn Hypervisor>,
    spec: MachineSpec,
    layout: Layout,
    built: Instant,
    phases: Mutex<Vec<PhaseReached>>,
    exit: watch::Sender<Option<ExitReason>>,
    /// The processes have ended and are reaped.
    gone: watch::Sender<bool>,
    running: OnceLock<Running>,
    /// What it has of what can change.
    size: Mutex<VmSize>,
}

#[derive(Debug)]
struct Running {
    supervisor: Arc<Supervisor>,
    control: OnceLock<Box<dyn Control>>,
}

impl ExternalVm {
    /// A VM that does not run yet; `program` is the supervisor's.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, spec: MachineSpec, program: PathBuf) -> Self {
        let size = VmSize {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
        };
        Self {
            shared: Arc::new(Shared {
                hypervisor,
                layout: Layout::new(&spec.dir),
                spec,
                built: Instant::now(),
                phases: Mutex::default(),
                exit: watch::Sender::new(None),
                gone: watch::Sender::new(false),
                running: OnceLock::new(),
                size: Mutex::new(size),
            }),
            nics: Mutex::default(),
            ports: Ports::default(),
            program,
        }
    }

    /// The VM that an earlier daemon started in the folder of `spec`; `None` when it has
    /// ended meanwhile.
    ///
    /// # Errors
    /// It runs, but cannot be taken over; it is left alone.
    pub async fn find(
        hypervisor: Arc<dyn Hypervisor>,
        spec: MachineSpec,
        program: PathBuf,
    ) -> Result<Option<Self>, VmError> {
        let found = Supervisor::find(&spec.dir).map_err(|source| VmError::Io {
            what: "cannot find the VM's processes".to_owned(),
            source,
        })?;
        let Some(supervisor) = found else {
            return Ok(None);
        };
        let vm = Self::new(hypervisor, spec, program);
        vm.shared.follow(supervisor);
        vm.shared.connect(true, Vec::new()).await?;
        Ok(Some(vm))
    }

    /// The supervisor's process id, while there is one.
    #[must_use]
    pub fn supervisor_pid(&self) -> Option<u32> {
        self.shared.running.get().map(|r| r.supervisor.pid())
    }

    fn control(&self) -> Result<&dyn Control, VmError> {
        self.shared.ensure_running()?;
        let control = self.shared.running.get().and_then(|r| r.control.get());
        control
            .map(AsRef::as_ref)
            .ok_or(VmError::Exited(ExitReason::Stopped))
    }

    /// For a backend that has no such thing.
    fn ensure_can(&self, capability: Capability, what: &'static str) -> Result<(), VmError> {
        let can = self.shared.hypervisor.backend().can(capability);
        can.then_some(()).ok_or(VmError::Unsupported {
            what,
            backend: self.shared.hypervisor.name(),
        })
    }

    async fn launch(&self) -> Result<(), VmError> {
        let nics = std::mem::take(&mut *lock(&self.nics));
        let shared = &self.shared;
        let launch = shared.hypervisor.launch(&shared.spec, nics)?;
        let (spec, layout) = (&shared.spec, &shared.layout);
        let job = Job {
            name: spec.name.clone(),
            program: launch.program,
            args: launch.args,
            fds: launch.fds.iter().map(|(_, number)| *number).collect(),
            listens: launch.listens,
            lifeline: !spec.outlives_daemon,
            dir: layout.dir().to_owned(),
            console: layout.console(),
            console_cap_bytes: spec.console_cap_bytes,
            share: Some(ShareJob {
                socket: layout.fs(),
                tag: spec.share_tag.clone(),
                root: spec.share.clone(),
                workers: spec.share_workers,
                cache: spec.share_cache.into(),
            }),
            vsock: match launch.vsock {
                GuestVsock::Ours => Some(VsockJob::Device {
                    socket: layout.vsock_device(),
                    uds: layout.vsock(),
                    guest_cid: GUEST_CID,
                }),
                GuestVsock::Kernels(guest_cid) => Some(VsockJob::Kernel {
                    uds: layout.vsock(),
                    guest_cid,
                    control_port: spec.control_port,
                }),
                GuestVsock::Vmms => None,
            },
        };
        let supervisor =
            Supervisor::launch(&self.program, &job, launch.fds, spec.api_limit).await?;
        shared.mark_phase("vmm running");
        shared.follow(supervisor);
        shared.connect(false, launch.nics).await?;
        shared.mark_phase("kernel entered");
        tracing::info!(
            pod = spec.name,
            vmm = shared.hypervisor.name(),
            pid = self.pid(),
            "machine started"
        );
        Ok(())
    }
}

impl Shared {
    fn ensure_running(&self) -> Result<(), VmError> {
        let reason = self.exit.borrow().clone();
        reason.map_or(Ok(()), |reason| Err(VmError::Exited(reason)))
    }

    /// Tells when the processes end.
    fn follow(self: &Arc<Self>, supervisor: Supervisor) {
        let running = Running {
            supervisor: Arc::new(supervisor),
            control: OnceLock::new(),
        };
        let supervisor = Arc::clone(&running.supervisor);
        let _ = self.running.set(running);
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let ended = supervisor.ended().await;
            shared.report(shared.reason(&ended));
            drop(supervisor);
            shared.gone.send_replace(true);
        });
    }

    /// Connects to the VMM, unless that ends first.
    async fn connect(&self, running: bool, nics: Vec<Nic>) -> Result<(), VmError> {
        let mut exited = self.exit.subscribe();
        let process = self.running.get();
        let started = Started {
            pid: process.map_or(0, |process| process.supervisor.vmm_pid()),
            running,
            nics,
        };
        let connected = tokio::select! {
            connected = self.hypervisor.connect(&self.spec, started) => connected,
            _ = exited.wait_for(Option::is_some) => return Err(self.early_exit()),
        };
        let control = match connected {
            Ok(control) => control,
            Err(error) => {
                // A VMM that ends hangs up before it is seen to have ended.
                let ended = exited.wait_for(Option::is_some);
                return Err(match timeout(HANG_UP, ended).await {
                    Ok(_) => self.early_exit(),
                    Err(_) => error,
                });
            }
        };
        if running {
            // It may have grown since it was started.
            *lock(&self.size) = control.size().await?;
        }
        if let Some(running) = self.running.get() {
            let _ = running.control.set(control);
        }
        Ok(())
    }

    /// Why the VMM ended while it was connected to.
    fn early_exit(&self) -> VmError {
        let how = match self.exit.borrow().clone() {
            Some(ExitReason::Process(how)) => how,
            Some(reason) => reason.to_string(),
            None => String::new(),
        };
        let vmm = self.hypervisor.name();
        HvError::EarlyExit { vmm, how }.into()
    }

    /// The first reason stays.
    fn report(&self, reason: ExitReason) {
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            if first {
                *exit = Some(reason);
            }
            first
        });
    }

    /// Why the VM ended by itself.
    fn reason(&self, ended: &Ended) -> ExitReason {
        if let Some(failure) = &ended.failure {
            return ExitReason::Device(failure.clone());
        }
        if let Some(words) = self.console_tail().and_then(|tail| panic_words(&tail)) {
            return ExitReason::GuestPanic(words);
        }
        let control = self.running.get().and_then(|r| r.control.get());
        match control.and_then(|control| control.guest_end()) {
            Some(GuestEnd::Reset) => ExitReason::GuestReset,
            Some(GuestEnd::TripleFault) => ExitReason::TripleFault,
            Some(GuestEnd::Panicked) => ExitReason::GuestPanic("reported by the VMM".to_owned()),
            // A VMM that nobody told to end has seen the guest's end.
            None if control.is_some() && ended.code == Some(0) => ExitReason::GuestReset,
            None => ExitReason::Process(format!("{} {ended}", self.hypervisor.name())),
        }
    }

    fn console_tail(&self) -> Option<String> {
        let mut file = File::open(self.layout.console()).ok()?;
        let len = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))
            .ok()?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail).ok()?;
        Some(String::from_utf8_lossy(&tail).into_owned())
    }

    fn mark_phase(&self, name: &'static str) {
        let mut phases = lock(&self.phases);
        if phases.iter().all(|phase| phase.name != name) {
            phases.push(PhaseReached {
                name,
                since: self.built.elapsed(),
                exits: Default::default(),
            });
        }
    }
}

impl Drop for ExternalVm {
    fn drop(&mut self) {
        self.shared.report(ExitReason::Stopped);
        if let Some(running) = self.shared.running.get() {
            running.supervisor.kill();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
