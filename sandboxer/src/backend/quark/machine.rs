//! The life of a sandbox: its launcher, its process, its end.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use external_hv::quark::{Launch, NAME, Sandbox, log_tail, task_socket};
use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::{ExitReason, GuestListener, GuestStream, PhaseReached, Vm, VmError, VmStats};

use super::lock;
use super::root::Root;
use super::spec::sandbox_config;
use crate::backend::MachineRequest;
use crate::config;

/// A pod in Quark.
#[derive(Debug)]
pub(super) struct QuarkPod {
    pub(super) request: MachineRequest,
    pub(super) root: Arc<Root>,
    launch: Launch,
    sandbox: OnceLock<Sandbox>,
    /// Somebody wants it to end.
    ending: AtomicBool,
    exit: watch::Sender<Option<ExitReason>>,
}

impl QuarkPod {
    /// Makes the sandbox's root. Blocks.
    pub(super) fn new(
        settings: &config::Quark,
        limit: Duration,
        request: MachineRequest,
    ) -> Result<Self, VmError> {
        let root = Root::create(&request.dir, &sandbox_config(&request))
            .map_err(|e| VmError::Backend(Box::new(e)))?;
        Ok(Self::with(settings, limit, request, root))
    }

    /// The pod that an earlier daemon made, if its sandbox runs.
    pub(super) fn find(
        settings: &config::Quark,
        limit: Duration,
        request: MachineRequest,
    ) -> Result<Option<Arc<Self>>, VmError> {
        let found = Sandbox::find(&request.dir).map_err(|source| VmError::Io {
            what: "cannot look for the sandbox".to_owned(),
            source,
        })?;
        let Some(sandbox) = found else {
            return Ok(None);
        };
        let root = Root::adopt(&request.dir);
        let pod = Self::with(settings, limit, request, root);
        let pod = Arc::new(pod);
        // It has none yet.
        let _ = pod.sandbox.set(sandbox);
        pod.follow();
        Ok(Some(pod))
    }

    fn with(
        settings: &config::Quark,
        limit: Duration,
        request: MachineRequest,
        root: Root,
    ) -> Self {
        Self {
            launch: Launch {
                program: settings.path.clone(),
                id: request.pod.clone(),
                dir: request.dir.clone(),
                root: root.path().to_owned(),
                limit,
            },
            request,
            root: Arc::new(root),
            sandbox: OnceLock::new(),
            ending: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        }
    }

    /// Where it serves the Task API.
    pub(super) fn task_socket(&self) -> PathBuf {
        task_socket(&self.request.dir)
    }

    /// Ends it at once: Quark has no other way.
    pub(super) fn kill(&self) {
        self.ending.store(true, Ordering::SeqCst);
        if let Some(sandbox) = self.sandbox.get() {
            sandbox.process().kill();
        }
    }

    async fn launch(self: Arc<Self>) -> Result<(), VmError> {
        let sandbox = Sandbox::launch(self.launch.clone()).await?;
        // Started once.
        let _ = self.sandbox.set(sandbox);
        self.follow();
        if self.ending.load(Ordering::SeqCst) {
            self.kill();
        }
        Ok(())
    }

    /// Tells the end of its process, once nothing of it is left.
    fn follow(self: &Arc<Self>) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let Some(sandbox) = pod.sandbox.get() else {
                return;
            };
            if let Err(e) = sandbox.process().ended().await {
                tracing::error!(pod = pod.launch.id, "cannot be watched: {e}");
                sandbox.process().kill();
            }
            let root = Arc::clone(&pod.root);
            let _ = tokio::task::spawn_blocking(move || root.release()).await;
            let reason = if pod.ending.load(Ordering::SeqCst) {
                ExitReason::Stopped
            } else {
                let said = log_tail(&pod.request.dir).unwrap_or_default();
                ExitReason::Process(format!("{NAME}: {said}"))
            };
            pod.exit.send_replace(Some(reason));
        });
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct QuarkMachine {
    pod: Arc<QuarkPod>,
    built: Instant,
    phases: Mutex<Vec<PhaseReached>>,
}

impl QuarkMachine {
    pub(super) fn new(pod: Arc<QuarkPod>) -> Self {
        Self {
            pod,
            built: Instant::now(),
            phases: Mutex::default(),
        }
    }
}

impl Drop for QuarkMachine {
    fn drop(&mut self) {
        self.pod.kill();
    }
}

fn unsupported<T>(what: &'static str) -> Result<T, VmError> {
    Err(VmError::Unsupported {
        what,
        backend: NAME,
    })
}

#[async_trait]
impl Vm for QuarkMachine {
    fn backend(&self) -> &'static str {
        NAME
    }

    async fn start(&self) -> Result<(), VmError> {
        // A task: what it starts has an owner even if the caller goes away.
        tokio::spawn(Arc::clone(&self.pod).launch())
            .await
            .map_err(|e| VmError::Backend(Box::new(e)))?
    }

    async fn stop(&self, deadline: Duration) -> Result<(), VmError> {
        self.pod.kill();
        if self.pod.sandbox.get().is_none() {
            self.pod.exit.send_replace(Some(ExitReason::Stopped));
        }
        let mut exited = self.exited();
        timeout(deadline, exited.wait_for(Option::is_some))
            .await
            .map(drop)
            .map_err(|_| VmError::Deadline {
                what: "ending the sandbox",
                limit: deadline,
            })
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.pod.exit.subscribe()
    }

    async fn connect(&self, _: u32, _: Duration) -> Result<Box<dyn GuestStream>, VmError> {
        unsupported("connect to a port of the guest")
    }

    fn listen(&self, _: u32) -> Result<Box<dyn GuestListener>, VmError> {
        unsupported("listen for connections of the guest")
    }

    fn pid(&self) -> u32 {
        let sandbox = self.pod.sandbox.get();
        sandbox.map_or(0, |sandbox| sandbox.process().id().pid)
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        Vec::new()
    }

    fn host_processes(&self) -> Vec<i32> {
        i32::try_from(self.pid())
            .ok()
            .filter(|&pid| pid != 0)
            .into_iter()
            .collect()
    }

    fn stats(&self) -> VmStats {
        VmStats {
            phases: lock(&self.phases).clone(),
            memory_bytes: self.pod.request.memory_bytes,
            ..VmStats::default()
        }
    }

    fn mark_phase(&self, phase: &'static str) {
        let mut phases = lock(&self.phases);
        if phases.iter().all(|known| known.name != phase) {
            phases.push(PhaseReached {
                name: phase,
                since: self.built.elapsed(),
                exits: Default::default(),
            });
        }
    }

    fn console_tail(&self) -> Option<String> {
        log_tail(&self.pod.request.dir)
    }
}
