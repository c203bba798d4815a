use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use vmm_core::vm::{Disk, VmError, VmSize};

use super::NAME;
use crate::hypervisor::{
    Control, GuestEnd, HvError, Layout, MachineSpec, Nic, Started, card_address, in_use,
};
use crate::process::threads_named;
use crate::qmp::Qmp;
use crate::told::Told;

/// A running StratoVirt.
#[derive(Debug)]
pub(super) struct StratoControl {
    qmp: Arc<Qmp>,
    pid: u32,
    told: Arc<Told>,
    /// Ends the VMM when the guest resets.
    ending: AbortHandle,
    net_slots: usize,
    size: VmSize,
    /// One change at a time.
    plugging: tokio::sync::Mutex<()>,
}

/// Takes an event of StratoVirt's; whether the guest has reset.
fn take(told: &Told, name: &str, data: &Value) -> bool {
    let guests = data.get("guest").and_then(Value::as_bool) == Some(true);
    match name {
        "SHUTDOWN" if guests => told.ended(GuestEnd::Reset),
        "RESET" => {
            told.ended(GuestEnd::Reset);
            return true;
        }
        "DEVICE_DELETED" => {
            if let Some(device) = data.get("device").and_then(Value::as_str) {
                told.removed(device.to_owned());
            }
        }
        _ => {}
    }
    false
}

impl StratoControl {
    pub(super) async fn connect(spec: &MachineSpec, started: Started) -> Result<Self, HvError> {
        let (told, reset) = (Arc::new(Told::default()), Arc::new(Notify::new()));
        let sinks = (Arc::clone(&told), Arc::clone(&reset));
        let api = Layout::new(&spec.dir).api();
        let qmp = Qmp::connect(NAME, &api, spec.api_limit, move |(name, data)| {
            tracing::debug!(event = name, %data, "StratoVirt");
            if take(&sinks.0, name, data) {
                sinks.1.notify_one();
            }
        })
        .await?;
        let qmp = Arc::new(qmp);
        let quitting = Arc::clone(&qmp);
        let ending = tokio::spawn(async move {
            reset.notified().await;
            // It would boot the guest again; a VMM that has ended does not answer.
            let _ = quitting.execute("quit", json!({})).await;
        });
        Ok(Self {
            qmp,
            pid: started.pid,
            told,
            ending: ending.abort_handle(),
            net_slots: usize::try_from(spec.net_slots).unwrap_or(usize::MAX),
            size: VmSize {
                vcpus: spec.vcpus,
                memory_bytes: spec.memory_bytes,
            },
            plugging: tokio::sync::Mutex::default(),
        })
    }

    /// Adds a device behind a root port of its own, which nothing else is ever behind.
    async fn add_device(
        &self,
        device: String,
        port: usize,
        mut arguments: Value,
    ) -> Result<(), HvError> {
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.insert("id".to_owned(), device.into());
            arguments.insert("bus".to_owned(), format!("rp{port}").into());
            arguments.insert("addr".to_owned(), "0x0".into());
        }
        self.qmp.execute("device_add", arguments).await.map(drop)
    }

    /// Has the guest let go of a device.
    async fn remove_device(&self, device: &str, limit: Duration) -> Result<(), VmError> {
        let id = json!({ "id": device });
        let request = async { self.qmp.execute("device_del", id).await.map(drop) };
        self.told.removal(device, limit, request).await
    }
}

impl Drop for StratoControl {
    fn drop(&mut self) {
        self.ending.abort();
    }
}

#[async_trait]
impl Control for StratoControl {
    /// StratoVirt names them `CPU 0/Kvm`, `CPU 1/Kvm`...
    fn vcpu_threads(&self) -> Vec<i32> {
        threads_named(self.pid, "CPU ")
    }

    fn guest_end(&self) -> Option<GuestEnd> {
        self.told.guest_end()
    }

    async fn pause(&self) -> Result<(), VmError> {
        self.qmp.execute("stop", json!({})).await?;
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmError> {
        self.qmp.execute("cont", json!({})).await?;
        Ok(())
    }

    async fn attach_nic(&self, nic: Nic) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        let slot = nic.slot;
        let mut names = Vec::with_capacity(nic.queues.len());
        for (index, queue) in nic.queues.iter().enumerate() {
            let name = format!("tap{slot}q{index}");
            let arguments = json!({ "fdname": name });
            self.qmp
                .execute_with("getfd", arguments, Some(queue.as_fd()))
                .await?;
            names.push(name);
        }
        let id = format!("net{slot}");
        let netdev = json!({ "id": id, "type": "tap", "fds": names.join(":") });
        self.qmp.execute("netdev_add", netdev).await?;
        let mut card = json!({
            "driver": "virtio-net-pci", "netdev": id, "mac": card_address(slot),
        });
        if let (Some(card), true) = (card.as_object_mut(), names.len() > 1) {
            card.insert("mq".to_owned(), "on".into());
        }
        let added = self.add_device(format!("nic{slot}"), slot, card).await;
        if added.is_err() {
            let _ = self.qmp.execute("netdev_del", json!({ "id": id })).await;
        }
        Ok(added?)
    }

    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        self.remove_device(&format!("nic{slot}"), deadline).await?;
        let netdev = json!({ "id": format!("net{slot}") });
        self.qmp.execute("netdev_del", netdev).await?;
        Ok(())
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        let node = format!("blk{slot}");
        // Its asynchronous kind needs a disk without cache.
        let engine = if disk.direct { "native" } else { "off" };
        let backing = json!({
            "node-name": node, "driver": "raw", "read-only": disk.read_only, "discard": "unmap",
            "cache": { "direct": disk.direct },
            "file": { "driver": "file", "filename": disk.path, "aio": engine },
        });
        let opened = self.qmp.execute("blockdev-add", backing).await;
        opened.map_err(|error| in_use(&disk, error.into()))?;
        let device = json!({
            "driver": "virtio-blk-pci", "drive": node, "serial": disk.serial,
        });
        let port = self.net_slots.saturating_add(slot);
        let added = self.add_device(format!("disk{slot}"), port, device).await;
        if added.is_err() {
            let gone = json!({ "node-name": node });
            let _ = self.qmp.execute("blockdev-del", gone).await;
        }
        Ok(added?)
    }

    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        self.remove_device(&format!("disk{slot}"), deadline).await?;
        let node = json!({ "node-name": format!("blk{slot}") });
        self.qmp.execute("blockdev-del", node).await?;
        Ok(())
    }

    async fn resize(&self, _: VmSize) -> Result<(), VmError> {
        Err(VmError::Unsupported {
            what: "change its size",
            backend: NAME,
        })
    }

    async fn size(&self) -> Result<VmSize, VmError> {
        Ok(self.size)
    }
}
