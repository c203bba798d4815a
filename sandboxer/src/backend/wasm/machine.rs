//! The life of a pod without a machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::{ExitReason, GuestListener, GuestStream, PhaseReached, Vm, VmError, VmStats};

use super::agent::WasmPod;
use super::{NAME, lock};
use std::sync::Mutex;

/// See the module.
#[derive(Debug)]
pub(super) struct WasmMachine {
    pod: Arc<WasmPod>,
    built: Instant,
    phases: Mutex<Vec<PhaseReached>>,
}

impl WasmMachine {
    pub(super) fn new(pod: Arc<WasmPod>) -> Self {
        Self {
            pod,
            built: Instant::now(),
            phases: Mutex::default(),
        }
    }

    fn unsupported<T>(what: &'static str) -> Result<T, VmError> {
        Err(VmError::Unsupported {
            what,
            backend: NAME,
        })
    }
}

impl Drop for WasmMachine {
    fn drop(&mut self) {
        self.pod.kill();
    }
}

#[async_trait]
impl Vm for WasmMachine {
    fn backend(&self) -> &'static str {
        NAME
    }

    async fn start(&self) -> Result<(), VmError> {
        Ok(())
    }

    async fn stop(&self, deadline: Duration) -> Result<(), VmError> {
        self.pod.kill();
        timeout(deadline, self.pod.ended())
            .await
            .map_err(|_| VmError::Deadline {
                what: "ending the pod's programs",
                limit: deadline,
            })
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.pod.exited()
    }

    async fn connect(
        &self,
        _port: u32,
        _deadline: Duration,
    ) -> Result<Box<dyn GuestStream>, VmError> {
        Self::unsupported("connect to a port of the guest")
    }

    fn listen(&self, _port: u32) -> Result<Box<dyn GuestListener>, VmError> {
        Self::unsupported("listen for connections of the guest")
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        Vec::new()
    }

    fn stats(&self) -> VmStats {
        VmStats {
            phases: lock(&self.phases).clone(),
            memory_bytes: self.pod.memory_bytes(),
            ..VmStats::default()
        }
    }

    fn mark_phase(&self, phase: &'static str) {
        let mut phases = lock(&self.phases);
        if !phases.iter().any(|known| known.name == phase) {
            phases.push(PhaseReached {
                name: phase,
                since: self.built.elapsed(),
                exits: Default::default(),
            });
        }
    }

    async fn pause(&self) -> Result<(), VmError> {
        self.pod.pause(true);
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmError> {
        self.pod.pause(false);
        Ok(())
    }
}
