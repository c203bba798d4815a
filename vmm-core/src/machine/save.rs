//! Saving a machine.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::live::PAUSE_LIMIT;
use super::{Live, Machine};
use crate::arch;
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::memory::MemoryImage;
use crate::snapshot::{self, Base, MachineState, Snapshot, SnapshotError};
use crate::vm::ExitReason;

/// What saving a machine takes, on whatever thread that happens.
pub(super) struct Saver {
    host: Host,
    exit: ExitNotice,
    cmdline: String,
    live: Arc<Live>,
}

impl Machine {
    /// Ends the machine and makes it what others are cloned from. Blocks.
    ///
    /// # Errors
    /// The machine has ended, or a part of it cannot be saved. It has ended in any case.
    pub fn into_snapshot(self) -> Result<Snapshot, SnapshotError> {
        let live = self.live().ok_or_else(|| self.over())?;
        let saver = self.saver(live);
        let state = saver.state()?;
        let ram = saver.live.vm.ram().cloned();
        let ram = ram.ok_or(SnapshotError::NoMemory)?;
        self.exit.report(ExitReason::Stopped);
        drop(self.take_live());
        saver.live.tear_down();
        // The image is sealed, which takes that nothing else maps it.
        drop(saver);
        drop(self);
        let memory = MemoryImage::of(ram).map_err(SnapshotError::memory("seal"))?;
        Ok(Snapshot::new(state, memory))
    }

    pub(super) fn saver(&self, live: Arc<Live>) -> Saver {
        Saver {
            host: self.host.clone(),
            exit: self.exit.clone(),
            cmdline: self.cmdline.clone(),
            live,
        }
    }

    fn over(&self) -> SnapshotError {
        SnapshotError::Exited(self.exit.get().unwrap_or(ExitReason::Stopped))
    }
}

impl Saver {
    /// Writes the machine to an empty folder, as [`Snapshot::store`] does, but for what the
    /// snapshot in `base` has. It stays paused, its devices at rest. Blocks.
    pub(super) fn store(
        &self,
        dir: &Path,
        label: &str,
        base: Option<&Path>,
    ) -> Result<(), SnapshotError> {
        let ram = self.live.vm.ram().ok_or(SnapshotError::NoMemory)?;
        // First: the machine is not stopped for a base that cannot be used.
        let base = base.map(|base| Base::open(base, label, ram.size()));
        let base = base.transpose()?;
        let state = self.state()?;
        snapshot::store(dir, label, &state, base.as_ref(), |file, below| {
            ram.write_to(file, below)
        })
    }

    /// Pauses the vCPUs and stops the devices, in this order, and reads what they hold.
    fn state(&self) -> Result<MachineState, SnapshotError> {
        let live = &*self.live;
        if !live.pause() {
            return Err(SnapshotError::Deadline(PAUSE_LIMIT));
        }
        // It may have ended meanwhile.
        if let Some(reason) = self.exit.get() {
            return Err(SnapshotError::Exited(reason));
        }
        let mut devices = Vec::with_capacity(live.devices.len());
        for device in &live.devices {
            let saved = device.transport.save().map_err(SnapshotError::Device)?;
            devices.push(saved);
        }
        let disks = live.disks.save().map_err(SnapshotError::Device)?;
        let kvm = |(what, source): arch::Refused| SnapshotError::Kvm {
            what,
            source: source.into(),
        };
        let mut vcpus = Vec::with_capacity(live.members.len());
        for member in &live.members {
            let vcpu = member.lock().unwrap_or_else(PoisonError::into_inner);
            vcpus.push(arch::VcpuState::save(&self.host, vcpu.fd()).map_err(kvm)?);
        }
        let memory = live.vm.ram().map(crate::memory::GuestRam::size);
        Ok(MachineState {
            cmdline: self.cmdline.clone(),
            memory: memory.ok_or(SnapshotError::NoMemory)?,
            vcpus,
            // After the devices, whose last interrupts are in it.
            chips: arch::ChipsState::save(live.vm.fd()).map_err(kvm)?,
            legacy: live.legacy.save(),
            devices,
            disks,
        })
    }
}
