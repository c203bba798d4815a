use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use vmm_core::vm::{Disk, VmError, VmSize};

use super::api::Api;
use super::events::Events;
use super::{NAME, events_file};
use crate::hypervisor::{
    Control, GuestEnd, HvError, Layout, MachineSpec, Nic, Started, card_address,
};

/// A running Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct ChControl {
    api: Api,
    pid: u32,
    end: Arc<Mutex<Option<GuestEnd>>>,
    events: AbortHandle,
}

impl ChControl {
    pub(super) async fn connect(
        spec: &MachineSpec,
        vm: Value,
        started: Started,
    ) -> Result<Self, VmError> {
        let layout = Layout::new(&spec.dir);
        let api = Api::new(&layout.api(), spec.api_limit);
        let io = |source| VmError::Io {
            what: "cannot watch the events of Cloud Hypervisor".to_owned(),
            source,
        };
        let mut events = Events::open(&events_file(&layout)).map_err(io)?;
        let end = Arc::new(Mutex::new(None));
        let (told, ender) = (Arc::clone(&end), api.clone());
        let watching = tokio::spawn(async move {
            if let Ok(reason) = events.guest_end().await {
                *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                // It would boot the guest again; a VMM that has ended does not answer.
                let _ = ender.act("vmm.shutdown").await;
            }
        });
        let control = Self {
            api,
            pid: started.pid,
            end,
            events: watching.abort_handle(),
        };
        control.api.get("vmm.ping").await?;
        if started.running {
            control.api.get("vm.info").await?;
            return Ok(control);
        }
        control.api.put("vm.create", vm).await?;
        for nic in started.nics {
            control.add_net(nic).await?;
        }
        control.api.act("vm.boot").await?;
        Ok(control)
    }

    async fn add_net(&self, nic: Nic) -> Result<(), HvError> {
        let queues = nic.queues.len().saturating_mul(2);
        let card = json!({
            "id": format!("nic{}", nic.slot), "mac": card_address(nic.slot),
            "num_queues": queues,
        });
        self.api.put_with("vm.add-net", card, nic.queues).await?;
        Ok(())
    }

    async fn remove(&self, device: String) -> Result<(), VmError> {
        self.api
            .put("vm.remove-device", json!({ "id": device }))
            .await?;
        Ok(())
    }
}

impl Drop for ChControl {
    fn drop(&mut self) {
        self.events.abort();
    }
}

#[async_trait]
impl Control for ChControl {
    /// Cloud Hypervisor names them vcpu0, vcpu1...
    fn vcpu_threads(&self) -> Vec<i32> {
        let pid = i32::try_from(self.pid).unwrap_or(0);
        let tasks = procfs::process::Process::new(pid).and_then(|process| process.tasks());
        let tasks = tasks.into_iter().flatten().flatten();
        let is_vcpu = |task: &procfs::process::Task| {
            task.stat().is_ok_and(|stat| stat.comm.starts_with("vcpu"))
        };
        tasks.filter(is_vcpu).map(|task| task.tid).collect()
    }

    fn guest_end(&self) -> Option<GuestEnd> {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pause(&self) -> Result<(), VmError> {
        self.api.act("vm.pause").await?;
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmError> {
        self.api.act("vm.resume").await?;
        Ok(())
    }

    async fn attach_nic(&self, nic: Nic) -> Result<(), VmError> {
        self.add_net(nic).await?;
        Ok(())
    }

    async fn detach_nic(&self, slot: usize, _: Duration) -> Result<(), VmError> {
        self.remove(format!("nic{slot}")).await
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<(), VmError> {
        let disk = json!({
            "id": format!("disk{slot}"), "path": disk.path, "readonly": disk.read_only,
            "direct": disk.direct, "serial": disk.serial,
        });
        self.api.put("vm.add-disk", disk).await?;
        Ok(())
    }

    async fn detach_disk(&self, slot: usize, _: Duration) -> Result<(), VmError> {
        self.remove(format!("disk{slot}")).await
    }

    async fn resize(&self, size: VmSize) -> Result<(), VmError> {
        let size = json!({ "desired_vcpus": size.vcpus, "desired_ram": size.memory_bytes });
        self.api.put("vm.resize", size).await?;
        Ok(())
    }

    async fn size(&self) -> Result<VmSize, VmError> {
        let info = self.api.get("vm.info").await?;
        let number = |path| info.pointer(path).and_then(Value::as_u64);
        let vcpus = number("/config/cpus/boot_vcpus").and_then(|n| u32::try_from(n).ok());
        let memory = number("/memory_actual_size").or_else(|| number("/config/memory/size"));
        let size = vcpus.zip(memory).map(|(vcpus, memory_bytes)| VmSize {
            vcpus,
            memory_bytes,
        });
        size.ok_or_else(|| {
            VmError::from(HvError::Protocol {
                vmm: NAME,
                why: "vm.info does not tell the VM's size".to_owned(),
            })
        })
    }
}
