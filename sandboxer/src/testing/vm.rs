//! The fake machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::{mpsc, watch};
use vmm_core::vm::{ExitReason, GuestListener, GuestStream, Vm, VmError, VmStats};

use super::Fault;
use super::agent::FakeAgent;
use crate::backend::MachineRequest;

#[derive(Debug)]
pub(crate) struct FakeVm {
    pub(crate) pod: String,
    pub(crate) request: MachineRequest,
    fault: Fault,
    exit: watch::Sender<Option<ExitReason>>,
    ports: Mutex<HashMap<u32, mpsc::UnboundedSender<DuplexStream>>>,
    agent: Arc<FakeAgent>,
}

impl FakeVm {
    pub(super) fn new(request: MachineRequest, fault: Fault) -> Self {
        let exit = watch::Sender::new(None);
        Self {
            pod: request.pod.clone(),
            request,
            fault,
            agent: Arc::new(FakeAgent::new(fault, exit.clone())),
            exit,
            ports: Mutex::default(),
        }
    }

    /// Ends the machine as if the guest had.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.finish(reason);
    }

    /// Breaks the control connection and dials again, as after a clone.
    pub(crate) async fn redial(&self) {
        self.dial().await;
    }

    /// What the agent was told about the pod.
    pub(crate) fn agent(&self) -> &Arc<FakeAgent> {
        &self.agent
    }

    async fn dial(&self) {
        let (host, guest) = duplex(64 * 1024);
        let port = self.ports().get(&agent_api::CONTROL_PORT).cloned();
        if let Some(port) = port {
            Arc::clone(&self.agent).serve(guest).await;
            let _ = port.send(host);
        }
    }

    fn finish(&self, reason: ExitReason) {
        self.ports().clear();
        self.agent.power_off();
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            if first {
                *exit = Some(reason);
            }
            first
        });
    }

    fn ports(&self) -> MutexGuard<'_, HashMap<u32, mpsc::UnboundedSender<DuplexStream>>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.finish(ExitReason::Stopped);
    }
}

struct Listener(mpsc::UnboundedReceiver<DuplexStream>);

#[async_trait]
impl GuestListener for Listener {
    async fn accept(&mut self) -> Option<Box<dyn GuestStream>> {
        self.0.recv().await.map(|stream| Box::new(stream) as _)
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn backend(&self) -> &'static str {
        "fake"
    }

    async fn start(&self) -> Result<(), VmError> {
        match self.fault {
            Fault::Start => {
                return Err(VmError::Unsupported {
                    what: "start a VM today",
                    backend: "fake",
                });
            }
            Fault::SilentGuest => {}
            Fault::EarlyExit => self.finish(ExitReason::TripleFault),
            _ => self.dial().await,
        }
        Ok(())
    }

    async fn stop(&self, _: Duration) -> Result<(), VmError> {
        self.finish(ExitReason::Stopped);
        Ok(())
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.subscribe()
    }

    async fn connect(&self, port: u32, _: Duration) -> Result<Box<dyn GuestStream>, VmError> {
        if self.fault == Fault::Streams || port != agent_api::STREAM_PORT {
            return Err(VmError::Refused(port));
        }
        let (host, guest) = duplex(64 * 1024);
        Arc::clone(&self.agent).accept_stream(guest);
        Ok(Box::new(host))
    }

    fn listen(&self, port: u32) -> Result<Box<dyn GuestListener>, VmError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.ports().insert(port, sender);
        Ok(Box::new(Listener(receiver)))
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        Vec::new()
    }

    fn stats(&self) -> VmStats {
        VmStats {
            memory_bytes: self.request.memory_bytes,
            ..Default::default()
        }
    }
}
