//! Pods in Quark: a process of its own for each, with a kernel written in Rust, that serves
//! containerd's Task API.
//!
//! [`machine`] is that process, from its launcher on; [`root`] the folder that it sees as its
//! root, with a folder for each container; [`spec`] what it is told; [`agent`] calls its Task
//! API; [`fifo`] the streams of its processes.

mod agent;
mod fifo;
mod machine;
mod root;
mod spec;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use external_hv::HvError;
use external_hv::hypervisor::check_program;
use external_hv::quark::NAME;
use vmm_core::vm::{Vm, VmError};

use self::agent::QuarkAgent;
use self::machine::{QuarkMachine, QuarkPod};
use super::{Built, Connecting, MachineRequest, SandboxBackend, check_folder};
use crate::agent::{AgentError, Limits};
use crate::config;

/// Why this host cannot run pods in Quark.
#[derive(Debug, thiserror::Error)]
pub enum QuarkBackendError {
    /// The launcher cannot be run.
    #[error(transparent)]
    Program(#[from] HvError),
    /// Quark's own configuration cannot be used.
    #[error(transparent)]
    Node(#[from] config::QuarkNodeError),
}

/// Makes pods in Quark.
#[derive(Debug)]
pub struct QuarkBackend {
    settings: config::Quark,
    /// How long a sandbox may take to start.
    boot: Duration,
    /// Pods that were built, until their agent is asked for.
    pods: Mutex<HashMap<String, Weak<QuarkPod>>>,
}

impl QuarkBackend {
    /// Looks at Quark's program and at its configuration. Blocks.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn new(config: &config::Config) -> Result<Self, QuarkBackendError> {
        let settings = config.quark.clone();
        check_program("quark.path", &settings.path)?;
        settings.check_node()?;
        Ok(Self {
            settings,
            boot: config.timeouts.boot,
            pods: Mutex::default(),
        })
    }

    fn machine(&self, id: String, pod: Arc<QuarkPod>) -> Arc<QuarkMachine> {
        let mut pods = lock(&self.pods);
        pods.retain(|_, pod| pod.strong_count() > 0);
        pods.insert(id, Arc::downgrade(&pod));
        Arc::new(QuarkMachine::new(pod))
    }
}

#[async_trait]
impl SandboxBackend for QuarkBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slow_kernel(&self) -> bool {
        false
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn enters_namespace(&self) -> bool {
        true
    }

    fn outlives_daemon(&self) -> bool {
        true
    }

    async fn recover(&self, request: MachineRequest) -> Result<Option<Arc<dyn Vm>>, VmError> {
        let id = request.pod.clone();
        let found = QuarkPod::find(&self.settings, self.boot, request)?;
        Ok(found.map(|pod| self.machine(id, pod) as _))
    }

    async fn build(&self, request: MachineRequest) -> Result<Built, VmError> {
        check_folder(&request.dir, "quark-task.sock")?;
        let id = request.pod.clone();
        let (settings, boot) = (self.settings.clone(), self.boot);
        let made = tokio::task::spawn_blocking(move || QuarkPod::new(&settings, boot, request));
        let pod = made.await.map_err(|e| VmError::Backend(Box::new(e)))??;
        Ok(self.machine(id, Arc::new(pod)).into())
    }

    fn agent(&self, pod: &str, _vm: &dyn Vm, limits: Limits) -> Result<Connecting, VmError> {
        let pod = lock(&self.pods).remove(pod).and_then(|pod| pod.upgrade());
        Ok(Box::pin(async move {
            let pod = pod.ok_or_else(|| AgentError::Disconnected {
                call: "start",
                reason: "the pod has ended".to_owned(),
            })?;
            QuarkAgent::connect(pod, limits).await
        }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
