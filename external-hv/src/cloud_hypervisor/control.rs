use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use vmm_core::vm::{Disk, VmError, VmSize};

use super::api::Api;
use super::events::{Events, News};
use super::{DISK_FORMAT_SINCE, NAME, events_pipe};
use crate::hypervisor::{
    Control, GuestEnd, HvError, Layout, MEMORY_STEP_BYTES, MachineSpec, Nic, Started, card_address,
    in_use,
};
use crate::process::threads_named;
use crate::told::Told;

/// A running Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct ChControl {
    api: Api,
    release: u32,
    pid: u32,
    told: Arc<Told>,
    events: AbortHandle,
    /// One change of size at a time.
    resizing: tokio::sync::Mutex<()>,
}

impl ChControl {
    pub(super) async fn connect(
        spec: &MachineSpec,
        release: u32,
        vm: Value,
        started: Started,
    ) -> Result<Self, VmError> {
        let layout = Layout::new(&spec.dir);
        let api = Api::new(&layout.api(), spec.api_limit);
        let events = Events::open(&events_pipe(&layout)).map_err(|source| VmError::Io {
            what: "cannot watch the events of Cloud Hypervisor".to_owned(),
            source,
        })?;
        let told = Arc::new(Told::default());
        let watching = tokio::spawn(watch(events, Arc::clone(&told), api.clone()));
        let control = Self {
            api,
            release,
            pid: started.pid,
            told,
            events: watching.abort_handle(),
            resizing: tokio::sync::Mutex::default(),
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

    async fn remove(&self, device: String, limit: Duration) -> Result<(), VmError> {
        let id = json!({ "id": device });
        let request = async { self.api.put("vm.remove-device", id).await.map(drop) };
        self.told.removal(&device, limit, request).await
    }
}

/// Hands on what the VMM tells, until it ends.
async fn watch(mut events: Events, told: Arc<Told>, api: Api) {
    loop {
        match events.next().await {
            Ok(Some(News::Removed(device))) => told.removed(device),
            Ok(Some(News::End(end))) => {
                told.ended(end);
                // It would boot the guest again; a VMM that has ended does not answer.
                let _ = api.act("vmm.shutdown").await;
            }
            Ok(None) => return,
            Err(err) => {
                tracing::warn!(%err, "Cloud Hypervisor's events are lost");
                return;
            }
        }
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
        threads_named(self.pid, "vcpu")
    }

    fn guest_end(&self) -> Option<GuestEnd> {
        self.told.guest_end()
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

    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        self.remove(format!("nic{slot}"), deadline).await
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<(), VmError> {
        if self.release < DISK_FORMAT_SINCE {
            return Err(VmError::from(HvError::Refused {
                vmm: NAME,
                request: format!("{} as a disk", disk.path.display()),
                why: format!(
                    "release {} takes a disk for what its guest writes to it; use release \
                     {DISK_FORMAT_SINCE} or later",
                    self.release
                ),
            }));
        }
        let drive = json!({
            "id": format!("disk{slot}"), "path": disk.path, "image_type": "Raw",
            "readonly": disk.read_only, "direct": disk.direct, "serial": disk.serial,
        });
        let added = self.api.put("vm.add-disk", drive).await;
        added.map(drop).map_err(|error| in_use(&disk, error.into()))
    }

    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        self.remove(format!("disk{slot}"), deadline).await
    }

    async fn resize(&self, size: VmSize) -> Result<(), VmError> {
        let _resizing = self.resizing.lock().await;
        let now = self.size().await?;
        let missing = size.memory_bytes.saturating_sub(now.memory_bytes);
        let more = missing.next_multiple_of(MEMORY_STEP_BYTES);
        let size = json!({
            "desired_vcpus": size.vcpus.max(now.vcpus),
            "desired_ram": now.memory_bytes.saturating_add(more),
        });
        self.api.put("vm.resize", size).await?;
        Ok(())
    }

    async fn size(&self) -> Result<VmSize, VmError> {
        let info = self.api.get("vm.info").await?;
        let number = |path| info.pointer(path).and_then(Value::as_u64);
        let vcpus = number("/config/cpus/boot_vcpus").and_then(|n| u32::try_from(n).ok());
        let memory = number("/config/memory/size");
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
