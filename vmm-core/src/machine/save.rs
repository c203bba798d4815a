//! Saving a machine.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Live, Machine};
use crate::arch;
use crate::memory::MemoryImage;
use crate::snapshot::{self, MachineState, Snapshot, SnapshotError};
use crate::vm::ExitReason;

/// As for a pause: vCPUs leave the guest within microseconds.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

impl Machine {
    /// Ends the machine and makes it what others are cloned from. Blocks.
    ///
    /// # Errors
    /// The machine has ended, or a part of it cannot be saved. It has ended in any case.
    pub fn into_snapshot(self) -> Result<Snapshot, SnapshotError> {
        let live = self.running()?;
        let state = self.save_state(&live)?;
        let ram = live.vm.ram().cloned().ok_or(SnapshotError::NoMemory)?;
        self.exit.report(ExitReason::Stopped);
        drop(self.take_live());
        live.tear_down();
        // The image is sealed, which takes that nothing else maps it.
        drop(live);
        drop(self);
        let memory = MemoryImage::of(ram).map_err(SnapshotError::memory("seal"))?;
        Ok(Snapshot::new(state, memory))
    }

    /// Writes the machine to an empty folder, as [`Snapshot::store`] does. It is paused
    /// then, its devices at rest, until [`Self::go_on`]. Blocks.
    ///
    /// # Errors
    /// The machine has ended, or a part of it cannot be saved or written.
    pub fn store(&self, dir: &Path, label: &str) -> Result<(), SnapshotError> {
        let live = self.running()?;
        let state = self.save_state(&live)?;
        let ram = live.vm.ram().ok_or(SnapshotError::NoMemory)?;
        snapshot::store(dir, label, &state, |file| ram.write_to(file))
    }

    /// Lets a machine that was stored run again.
    ///
    /// # Errors
    /// The machine has ended, or a device does not start again.
    pub fn go_on(&self) -> Result<(), SnapshotError> {
        let live = self.running()?;
        for device in &live.devices {
            device.transport.resume()?;
        }
        live.vcpus.run();
        Ok(())
    }

    fn running(&self) -> Result<Arc<Live>, SnapshotError> {
        if let Some(reason) = self.exit.get() {
            return Err(SnapshotError::Exited(reason));
        }
        self.live()
            .ok_or(SnapshotError::Exited(ExitReason::Stopped))
    }

    /// Pauses the vCPUs and stops the devices, in this order, and reads what they hold.
    fn save_state(&self, live: &Live) -> Result<MachineState, SnapshotError> {
        let limit = Instant::now()
            .checked_add(PAUSE_LIMIT)
            .unwrap_or_else(Instant::now);
        if !live.vcpus.pause(limit) {
            return Err(SnapshotError::Deadline(PAUSE_LIMIT));
        }
        // It may have ended meanwhile.
        self.running()?;
        let mut devices = Vec::with_capacity(live.devices.len());
        for device in &live.devices {
            let saved = device.transport.save().map_err(SnapshotError::Device)?;
            devices.push(saved);
        }
        let kvm = |(what, source): arch::Refused| SnapshotError::Kvm {
            what,
            source: source.into(),
        };
        let mut vcpus = Vec::with_capacity(live.members.len());
        for member in &live.members {
            let vcpu = member.lock().unwrap_or_else(PoisonError::into_inner);
            vcpus.push(arch::VcpuState::save(&self.host, vcpu.fd()).map_err(kvm)?);
        }
        Ok(MachineState {
            cmdline: self.cmdline.clone(),
            memory_bytes: self.memory_bytes,
            vcpus,
            // After the devices, whose last interrupts are in it.
            chips: arch::ChipsState::save(live.vm.fd()).map_err(kvm)?,
            legacy: live.legacy.save(),
            devices,
        })
    }
}
