//! Disks of containers: plugged into the pod's machine when a container needs them, and out
//! when it goes.

pub(crate) mod plan;

use std::collections::BTreeMap;
use std::sync::Mutex;

use agent_api::rpc;
use serde::{Deserialize, Serialize};
use tracing::warn;
use vmm_core::vm::{Disk, DiskPlace};

use self::plan::{DiskUse, WantedDisk};
use super::{Machine, Pod, PodError, Result, lock};
use crate::causes::with_causes;

/// Which slots of a machine are taken, and by what.
#[derive(Debug, Default)]
pub(super) struct DiskSlots(Mutex<BTreeMap<usize, Disk>>);

impl DiskSlots {
    /// Takes a free slot for what `disk` makes of its number.
    fn take(&self, slots: usize, disk: impl FnOnce(usize) -> Disk) -> Option<(usize, Disk)> {
        let mut taken = lock(&self.0);
        let slot = (0..slots).find(|slot| !taken.contains_key(slot))?;
        let disk = disk(slot);
        taken.insert(slot, disk.clone());
        Some((slot, disk))
    }

    fn free(&self, slot: usize) {
        lock(&self.0).remove(&slot);
    }

    /// Takes the slots of a machine that had disks when it was written to disk.
    pub(super) fn restored(disks: impl IntoIterator<Item = PluggedDisk>) -> Self {
        let taken = disks
            .into_iter()
            .map(|plugged| (plugged.slot, plugged.disk));
        Self(Mutex::new(taken.collect()))
    }
}

/// A disk in the pod's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PluggedDisk {
    pub(super) slot: usize,
    pub(super) disk: Disk,
    place: DiskPlace,
}

impl PluggedDisk {
    fn to_rpc(&self) -> rpc::Disk {
        rpc::Disk {
            serial: self.disk.serial.clone(),
            mmio_device: match self.place {
                DiskPlace::MmioDevice(number) => Some(number),
                DiskPlace::Serial => None,
            },
            ..Default::default()
        }
    }
}

/// What the guest has of the disks that a container wants.
#[derive(Debug, Default)]
pub(super) struct GuestDisks {
    /// To be mounted before the container is created.
    pub(super) mounts: Vec<rpc::Mount>,
    /// Paths of devices in the container, and their numbers in the guest.
    pub(super) devices: Vec<(String, rpc::DiskReply)>,
}

impl Pod {
    /// Plugs disks in, appending to `plugged` what is to be unplugged again, also on failure.
    pub(super) async fn attach_disks(
        &self,
        machine: &Machine,
        wanted: &[WantedDisk],
        plugged: &mut Vec<PluggedDisk>,
    ) -> Result<GuestDisks> {
        let mut guest = GuestDisks::default();
        for wanted in wanted {
            let slots = machine.vm.disk_slots();
            let disk = |slot| Disk {
                path: wanted.source.clone(),
                read_only: wanted.read_only,
                direct: false,
                serial: format!("disk{slot}"),
            };
            let (slot, disk) = machine.disks.take(slots, disk).ok_or_else(|| {
                PodError::invalid(
                    "disk",
                    wanted.source.display().to_string(),
                    format!(
                        "needs a disk slot, and the {slots} of this sandbox are taken: raise \
                         vm.disk_slots"
                    ),
                )
            })?;
            let attached = machine.vm.attach_disk(slot, disk.clone()).await;
            let place = attached.map_err(|e| {
                machine.disks.free(slot);
                self.vm_error(e)
            })?;
            let disk = PluggedDisk { slot, disk, place };
            let found = disk.to_rpc();
            plugged.push(disk);
            let found = machine.agent.attach_disk(found).await?;
            match &wanted.usage {
                DiskUse::Mount {
                    target,
                    fstype,
                    options,
                } => guest.mounts.push(rpc::Mount {
                    source: found.path,
                    target: target.clone(),
                    fstype: fstype.clone(),
                    options: options.clone(),
                    ..Default::default()
                }),
                DiskUse::Device(path) => guest.devices.push((path.clone(), found)),
            }
        }
        Ok(guest)
    }

    /// Unplugs disks that nothing is mounted from any more. One that stays in use keeps its
    /// slot; it goes with the machine.
    pub(super) async fn detach_disks(&self, machine: &Machine, disks: Vec<PluggedDisk>) {
        for disk in disks.into_iter().rev() {
            let path = disk.disk.path.display();
            if let Err(e) = machine.agent.detach_disk(disk.to_rpc()).await {
                warn!(pod = self.id(), "the guest keeps {path}: {e}");
            }
            let limit = self.environment.timeouts.stop;
            match machine.vm.detach_disk(disk.slot, limit).await {
                Ok(()) => machine.disks.free(disk.slot),
                Err(e) => warn!(
                    pod = self.id(),
                    "disk {path} stays plugged in: {}",
                    with_causes(&e)
                ),
            }
        }
    }
}
