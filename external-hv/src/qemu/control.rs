use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use vmm_core::vm::{Disk, VmError, VmSize};

use super::{NAME, QemuConfig};
use crate::hypervisor::{
    Control, GuestEnd, HvError, Layout, MEMORY_STEP_BYTES, MachineSpec, Nic, card_address, in_use,
};
use crate::qmp::Qmp;
use crate::told::Told;

/// A running QEMU.
#[derive(Debug)]
pub(super) struct QemuControl {
    qmp: Qmp,
    config: Arc<QemuConfig>,
    told: Arc<Told>,
    threads: Mutex<Vec<i32>>,
    /// Root ports in use, by device.
    ports: Mutex<BTreeMap<u32, String>>,
    /// How many there are.
    root_ports: u32,
    memory_bytes: u64,
    /// One hotplug at a time.
    plugging: tokio::sync::Mutex<()>,
}

/// Takes an event of QEMU's.
fn take(told: &Told, name: &str, data: &Value) {
    let text = |key| data.get(key).and_then(Value::as_str);
    match (name, text("reason")) {
        ("SHUTDOWN", Some("guest-panic")) | ("GUEST_PANICKED", _) => told.ended(GuestEnd::Panicked),
        ("SHUTDOWN", Some("guest-reset" | "guest-shutdown" | "subsystem-reset")) => {
            told.ended(GuestEnd::Reset);
        }
        ("DEVICE_DELETED", _) => {
            if let Some(device) = text("device") {
                told.removed(device.to_owned());
            }
        }
        _ => {}
    }
}

impl QemuControl {
    pub(super) async fn connect(
        config: Arc<QemuConfig>,
        spec: &MachineSpec,
    ) -> Result<Self, HvError> {
        let told = Arc::new(Told::default());
        let sink = Arc::clone(&told);
        let api = Layout::new(&spec.dir).api();
        let qmp = Qmp::connect(NAME, &api, spec.api_limit, move |(name, data)| {
            tracing::debug!(event = name, %data, "QEMU");
            take(&sink, name, data);
        })
        .await?;
        let control = Self {
            qmp,
            told,
            threads: Mutex::default(),
            ports: Mutex::default(),
            root_ports: super::root_ports(config.machine, spec),
            memory_bytes: spec.memory_bytes,
            plugging: tokio::sync::Mutex::default(),
            config,
        };
        control.find_threads().await?;
        control.find_ports().await?;
        Ok(control)
    }

    async fn find_threads(&self) -> Result<(), HvError> {
        let cpus = self.qmp.execute("query-cpus-fast", json!({})).await?;
        let threads = cpus.as_array().into_iter().flatten();
        let threads = threads.filter_map(|cpu| cpu.get("thread-id")?.as_i64());
        *lock(&self.threads) = threads.filter_map(|id| i32::try_from(id).ok()).collect();
        Ok(())
    }

    /// Finds the root ports that are taken, also since an earlier daemon.
    async fn find_ports(&self) -> Result<(), HvError> {
        if self.root_ports == 0 {
            return Ok(());
        }
        let buses = self.qmp.execute("query-pci", json!({})).await?;
        let mut ports = BTreeMap::new();
        let devices = buses.as_array().into_iter().flatten();
        let devices = devices.filter_map(|bus| bus.get("devices")?.as_array());
        for device in devices.flatten() {
            let id = device.get("qdev_id").and_then(Value::as_str).unwrap_or("");
            let port = id.strip_prefix("rp").and_then(|port| port.parse().ok());
            let behind = device.pointer("/pci_bridge/devices/0/qdev_id");
            if let (Some(port), Some(behind)) = (port, behind.and_then(Value::as_str)) {
                ports.insert(port, behind.to_owned());
            }
        }
        *lock(&self.ports) = ports;
        Ok(())
    }

    /// Where `device` goes.
    fn take_bus(&self, device: &str) -> Result<String, VmError> {
        if self.root_ports == 0 {
            return Ok("pci.0".to_owned());
        }
        let mut ports = lock(&self.ports);
        let free = (0..self.root_ports).find(|port| !ports.contains_key(port));
        let port = free.ok_or_else(|| {
            VmError::from(HvError::Refused {
                vmm: NAME,
                request: format!("a place for {device}"),
                why: format!("all {} root ports are taken", self.root_ports),
            })
        })?;
        ports.insert(port, device.to_owned());
        Ok(format!("rp{port}"))
    }

    fn free_bus(&self, device: &str) {
        lock(&self.ports).retain(|_, behind| behind != device);
    }

    /// Adds a device; its place is free again if it cannot be.
    async fn add_device(&self, device: &str, mut arguments: Value) -> Result<(), VmError> {
        let bus = self.take_bus(device)?;
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.insert("bus".to_owned(), bus.into());
            arguments.insert("id".to_owned(), device.into());
        }
        let added = self.qmp.execute("device_add", arguments).await;
        if added.is_err() {
            self.free_bus(device);
        }
        added.map(drop).map_err(VmError::from)
    }

    /// Asks the guest to let go of a device, and waits until it has.
    async fn remove_device(&self, device: &str, limit: Duration) -> Result<(), VmError> {
        let id = json!({ "id": device });
        let request = async { self.qmp.execute("device_del", id).await.map(drop) };
        self.told.removal(device, limit, request).await?;
        self.free_bus(device);
        Ok(())
    }

    async fn add_vcpus(&self, wanted: usize) -> Result<(), VmError> {
        let cpus = self
            .qmp
            .execute("query-hotpluggable-cpus", json!({}))
            .await?;
        let mut free: Vec<&Value> = cpus
            .as_array()
            .into_iter()
            .flatten()
            .filter(|cpu| cpu.get("qom-path").is_none())
            .collect();
        let place = |cpu: &&Value| {
            let part = |key: &str| {
                let part = cpu.pointer(&format!("/props/{key}"));
                part.and_then(Value::as_u64).unwrap_or(0)
            };
            (part("socket-id"), part("core-id"), part("thread-id"))
        };
        free.sort_by_key(place);
        let mut now = lock(&self.threads).len();
        for cpu in free {
            if now >= wanted {
                break;
            }
            let mut arguments = cpu.get("props").cloned().unwrap_or_else(|| json!({}));
            if let Some(arguments) = arguments.as_object_mut() {
                let driver = cpu.get("type").cloned().unwrap_or(Value::Null);
                arguments.insert("driver".to_owned(), driver);
                arguments.insert("id".to_owned(), format!("cpu{now}").into());
            }
            self.qmp.execute("device_add", arguments).await?;
            now = now.saturating_add(1);
        }
        self.find_threads().await?;
        Ok(())
    }

    /// Memory at boot and what was plugged in.
    async fn memory(&self) -> Result<(u64, usize), HvError> {
        let devices = self.qmp.execute("query-memory-devices", json!({})).await?;
        let devices = devices.as_array().cloned().unwrap_or_default();
        let plugged = devices
            .iter()
            .filter_map(|device| device.pointer("/data/size")?.as_u64())
            .fold(0_u64, u64::saturating_add);
        Ok((self.memory_bytes.saturating_add(plugged), devices.len()))
    }

    async fn add_memory(&self, bytes: u64, index: usize) -> Result<(), VmError> {
        let backing = format!("ram{}", index.saturating_add(1));
        let object = json!({
            "qom-type": "memory-backend-memfd", "id": backing, "size": bytes, "share": true,
            "hugetlb": self.config.hugepages,
        });
        self.qmp.execute("object-add", object).await?;
        let dimm = json!({
            "driver": "pc-dimm", "id": format!("dimm{}", index.saturating_add(1)),
            "memdev": backing,
        });
        if let Err(err) = self.qmp.execute("device_add", dimm).await {
            let _ = self
                .qmp
                .execute("object-del", json!({ "id": backing }))
                .await;
            return Err(err.into());
        }
        Ok(())
    }
}

#[async_trait]
impl Control for QemuControl {
    fn vcpu_threads(&self) -> Vec<i32> {
        lock(&self.threads).clone()
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
        let netdev = format!("net{slot}");
        self.qmp
            .execute(
                "netdev_add",
                json!({ "type": "tap", "id": netdev, "fds": names.join(":"), "vhost": false }),
            )
            .await?;
        let mut card = json!({
            "driver": "virtio-net-pci", "netdev": netdev, "mac": card_address(slot), "romfile": "",
        });
        if let (Some(card), true) = (card.as_object_mut(), names.len() > 1) {
            let vectors = names.len().saturating_mul(2).saturating_add(2);
            card.insert("mq".to_owned(), true.into());
            card.insert("vectors".to_owned(), vectors.into());
        }
        let added = self.add_device(&format!("nic{slot}"), card).await;
        if added.is_err() {
            let _ = self
                .qmp
                .execute("netdev_del", json!({ "id": netdev }))
                .await;
        }
        added
    }

    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        self.remove_device(&format!("nic{slot}"), deadline).await?;
        let netdev = json!({ "id": format!("net{slot}") });
        self.qmp.execute("netdev_del", netdev).await?;
        Ok(())
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<(), VmError> {
        use std::os::unix::fs::FileTypeExt;
        let _plugging = self.plugging.lock().await;
        let failed = |source| VmError::Io {
            what: format!("cannot use {} as a disk", disk.path.display()),
            source,
        };
        let kind = std::fs::metadata(&disk.path).map_err(failed)?.file_type();
        let driver = if kind.is_block_device() {
            "host_device"
        } else {
            "file"
        };
        let node = format!("blk{slot}");
        self.qmp
            .execute(
                "blockdev-add",
                json!({
                    "driver": "raw", "node-name": node, "read-only": disk.read_only,
                    "discard": "unmap", "cache": { "direct": disk.direct },
                    "file": {
                        "driver": driver, "filename": disk.path, "read-only": disk.read_only,
                        "discard": "unmap", "cache": { "direct": disk.direct },
                    },
                }),
            )
            .await?;
        let device = json!({
            "driver": "virtio-blk-pci", "drive": node, "serial": disk.serial,
        });
        let added = self.add_device(&format!("disk{slot}"), device).await;
        if added.is_err() {
            let gone = json!({ "node-name": node });
            let _ = self.qmp.execute("blockdev-del", gone).await;
        }
        added.map_err(|error| in_use(&disk, error))
    }

    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        self.remove_device(&format!("disk{slot}"), deadline).await?;
        let node = json!({ "node-name": format!("blk{slot}") });
        self.qmp.execute("blockdev-del", node).await?;
        Ok(())
    }

    async fn resize(&self, size: VmSize) -> Result<(), VmError> {
        let _plugging = self.plugging.lock().await;
        let wanted = usize::try_from(size.vcpus).unwrap_or(usize::MAX);
        if wanted > lock(&self.threads).len() {
            self.add_vcpus(wanted).await?;
        }
        let (now, pieces) = self.memory().await?;
        let missing = size.memory_bytes.saturating_sub(now);
        let missing = missing.next_multiple_of(MEMORY_STEP_BYTES);
        if missing > 0 {
            self.add_memory(missing, pieces).await?;
        }
        Ok(())
    }

    async fn size(&self) -> Result<VmSize, VmError> {
        let (memory_bytes, _) = self.memory().await?;
        let vcpus = lock(&self.threads).len();
        Ok(VmSize {
            vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
            memory_bytes,
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
