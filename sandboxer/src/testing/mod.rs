//! A machine without a CPU, for tests of everything above it.
//!
//! [`FakeBackend`] makes [`FakeVm`]s whose "guest" is a small agent in this process that
//! speaks the real contract over in-memory streams. [`Faults`] make either of them fail.

mod agent;
mod vm;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use vmm_core::vm::VmError;

use crate::backend::{Built, MachineRequest, SandboxBackend};
use crate::config::Timeouts;
pub(crate) use vm::FakeVm;

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The machine cannot be built.
    Build,
    /// The vCPUs cannot be started.
    Start,
    /// The guest never dials.
    SilentGuest,
    /// The guest ends before it dials.
    EarlyExit,
    /// The agent is of another version.
    OldAgent,
    /// The agent refuses to set the sandbox up.
    Setup,
    /// The agent refuses to create containers.
    Create,
    /// The guest accepts no byte streams.
    Streams,
    /// The guest does not react to a shutdown.
    DeafGuest,
}

/// Makes fake machines.
#[derive(Debug, Default)]
pub(crate) struct FakeBackend {
    pub(crate) fault: Fault,
    machines: Mutex<Vec<Arc<FakeVm>>>,
}

impl FakeBackend {
    pub(crate) fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            fault,
            machines: Mutex::default(),
        })
    }

    /// The machine of a pod.
    pub(crate) fn machine(&self, pod: &str) -> Arc<FakeVm> {
        let machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        let found = machines.iter().find(|vm| vm.pod == pod);
        Arc::clone(found.expect("the machine was built"))
    }
}

#[async_trait]
impl SandboxBackend for FakeBackend {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn slow_kernel(&self) -> bool {
        false
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("FAKE".to_owned(), "1".to_owned())])
    }

    async fn build(&self, request: MachineRequest) -> Result<Built, VmError> {
        if self.fault == Fault::Build {
            return Err(VmError::Unsupported {
                what: "build a VM today",
                backend: self.name(),
            });
        }
        let vm = Arc::new(FakeVm::new(request, self.fault));
        self.machines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&vm));
        Ok(vm.into())
    }
}

/// Times that no passing test waits out.
pub(crate) fn patient() -> Timeouts {
    Timeouts {
        boot: Duration::from_secs(60),
        agent_call: Duration::from_secs(60),
        connect: Duration::from_secs(60),
        stop: Duration::from_secs(60),
        drain: Duration::from_secs(60),
        slow_host_factor: 1,
    }
}

/// Times for tests that wait them out.
pub(crate) fn hasty() -> Timeouts {
    let short = Duration::from_millis(200);
    Timeouts {
        boot: short,
        agent_call: short,
        connect: short,
        stop: short,
        drain: short,
        slow_host_factor: 1,
    }
}
