//! Disks that come and go.

use std::fs;
use std::path::Path;

use super::*;
use crate::config::ConsoleLog;
use crate::machine::{BuildError, CloneConfig, DiskError};
use crate::snapshot::Snapshot;
use crate::vm::{Disk, DiskPlace, VmError};
use crate::{DeviceSet, MachineConfig};

const SLOTS: usize = 3;

fn devices() -> DeviceSet {
    DeviceSet::new().with_rng().unwrap().with_disk_slots(SLOTS)
}

fn disk(path: &Path) -> Disk {
    Disk {
        path: path.to_owned(),
        read_only: false,
        direct: false,
        serial: "data".to_owned(),
    }
}

fn with_slots(config: MachineConfig) -> MachineConfig {
    MachineConfig {
        devices: devices(),
        ..config
    }
}

/// Fds of this process that lead to `path`.
fn open_fds(path: &Path) -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let leads = |fd: std::io::Result<fs::DirEntry>| {
        fs::read_link(fd.unwrap().path()).is_ok_and(|target| target == path)
    };
    fds.map(leads).filter(|leads| *leads).count()
}

fn cause(err: VmError) -> DiskError {
    let VmError::Backend(err) = err else {
        panic!("{err}");
    };
    *err.downcast().unwrap()
}

#[test]
fn a_slot_takes_one_disk_after_the_other() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 4096]).unwrap();
    let machine = machine_with(&host, "slots", &Code::new().halt(), with_slots);
    assert_eq!(machine.disk_slots(), SLOTS);
    runtime().block_on(async {
        machine.start().await.unwrap();
        for round in 0..50 {
            let slot = round % SLOTS;
            let place = machine.attach_disk(slot, disk(&path)).await.unwrap();
            // Behind the entropy device.
            let number = u32::try_from(slot).unwrap() + 1;
            assert_eq!(place, DiskPlace::MmioDevice(number));
            assert_eq!(open_fds(&path), 1);
            let err = machine.attach_disk(slot, disk(&path)).await.unwrap_err();
            assert!(matches!(cause(err), DiskError::InUse(_)));
            machine.detach_disk(slot, PATIENCE).await.unwrap();
            assert_eq!(open_fds(&path), 0);
            let err = machine.detach_disk(slot, PATIENCE).await.unwrap_err();
            assert!(matches!(cause(err), DiskError::Empty(_)));
        }
        let err = machine.attach_disk(SLOTS, disk(&path)).await.unwrap_err();
        assert!(
            matches!(err, VmError::NoDiskSlot { slots: SLOTS, .. }),
            "{err}"
        );
        let missing = disk(&dir.path().join("missing"));
        let err = machine.attach_disk(0, missing).await.unwrap_err();
        assert!(err.to_string().contains("missing"), "{err}");
        // It ends with one plugged in.
        machine.attach_disk(0, disk(&path)).await.unwrap();
        machine.stop(PATIENCE).await.unwrap();
        let err = machine.attach_disk(1, disk(&path)).await.unwrap_err();
        assert!(matches!(err, VmError::Exited(_)), "{err}");
    });
    assert_eq!(open_fds(&path), 0);
}

#[test]
fn a_restored_machine_needs_the_disks_it_had() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 4096]).unwrap();
    let machine = machine_with(&host, "original", &Code::new().halt(), with_slots);
    let saved = dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    runtime().block_on(async {
        machine.start().await.unwrap();
        machine.attach_disk(1, disk(&path)).await.unwrap();
        machine.snapshot(&saved, "disks", None).await.unwrap();
    });
    // It has the image.
    drop(machine);
    let snapshot = Snapshot::load(&saved, "disks").unwrap();
    let restore = |devices| {
        let config = CloneConfig {
            name: "restored".to_owned(),
            console: ConsoleLog::default(),
            devices,
        };
        Machine::restore(&host, config, &snapshot, None)
    };
    restore(devices().with_disk(1, disk(&path))).unwrap();
    for other in [devices(), devices().with_disk(2, disk(&path))] {
        let err = restore(other).unwrap_err();
        assert!(
            matches!(err, BuildError::Disks(DiskError::Mismatch { .. })),
            "{err}"
        );
    }
    let fewer = DeviceSet::new().with_rng().unwrap().with_disk_slots(1);
    let err = restore(fewer).unwrap_err();
    assert!(matches!(err, BuildError::Mismatch { .. }), "{err}");
}
