//! A machine that goes on where another was saved.

use std::sync::Arc;

use super::frame::Frame;
use super::{BuildError, Machine, Phases, VmShell};
use crate::config::{self, ConsoleLog};
use crate::device_set::DeviceSet;
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::snapshot::Snapshot;
use crate::thread::VmThreads;
use crate::vcpu::VcpuState;

/// What is a clone's own. Sizes, kernel and command line are the snapshot's.
#[derive(Debug)]
pub struct CloneConfig {
    /// Names the machine in threads and logs, as [`crate::MachineConfig::name`].
    pub name: String,
    /// Serial console output from here on.
    pub console: ConsoleLog,
    /// The devices of the saved machine, fresh, in the same order.
    pub devices: DeviceSet,
}

impl Machine {
    /// Makes a machine that goes on where the snapshot was taken, ready to start. Its
    /// memory is shared with all other clones until it is written.
    ///
    /// A `shell` made ahead of time saves most of the work; without one it is made now.
    ///
    /// # Errors
    /// Devices or a shell other than the snapshot's, or a step that the host refused;
    /// everything done until then is undone.
    pub fn restore(
        host: &Host,
        config: CloneConfig,
        snapshot: &Snapshot,
        shell: Option<VmShell>,
    ) -> Result<Self, BuildError> {
        let phases = Arc::new(Phases::begin());
        config::validate_name(&config.name)?;
        config::validate_devices(&config.devices)?;
        let state = snapshot.state();
        if config.devices.len() != state.devices.len() {
            return Err(BuildError::Mismatch {
                what: "devices",
                found: config.devices.len(),
                saved: state.devices.len(),
            });
        }
        if config.devices.disk_slots() != state.disks.len() {
            return Err(BuildError::Mismatch {
                what: "disk slots",
                found: config.devices.disk_slots(),
                saved: state.disks.len(),
            });
        }
        let hotplug_bytes = config.devices.hotplug_bytes();
        if hotplug_bytes != state.memory.hotplug_bytes {
            return Err(BuildError::HotplugMemory {
                found: hotplug_bytes,
                saved: state.memory.hotplug_bytes,
            });
        }
        let shell = match shell {
            Some(shell) => shell,
            None => VmShell::create(host, snapshot.vcpus())?,
        };
        if shell.vcpus.len() != state.vcpus.len() {
            return Err(BuildError::Mismatch {
                what: "vCPUs",
                found: shell.vcpus.len(),
                saved: state.vcpus.len(),
            });
        }
        phases.mark_first(Phases::VM_CREATED);
        let bytes = snapshot.memory_bytes();
        let no_memory = |source| BuildError::Memory { bytes, source };
        let threads = VmThreads::new(&config.name, ExitNotice::new())
            .map_err(BuildError::thread("system call filter"))?;
        let ram = snapshot.memory().clone_memory(&threads);
        let ram = ram.map_err(no_memory)?;
        let names = config.devices.names();
        let frame = Frame::new(
            threads,
            &config.console,
            shell,
            ram,
            config.devices,
            Arc::clone(&phases),
        )?;
        let kvm = |(what, err): (&'static str, kvm_ioctls::Error)| BuildError::kvm(what)(err);
        state.chips.restore(frame.shell.vm.fd()).map_err(kvm)?;
        for (vcpu, saved) in frame.shell.vcpus.iter().zip(&state.vcpus) {
            saved.restore(vcpu).map_err(kvm)?;
        }
        // Devices last: they raise interrupts that may have been on their way.
        frame
            .legacy
            .restore(&state.legacy)
            .map_err(BuildError::Serial)?;
        for ((device, saved), name) in frame.attached.iter().zip(&state.devices).zip(names) {
            device
                .transport
                .restore(saved)
                .map_err(|source| BuildError::Restore { name, source })?;
        }
        frame.disks.restore(&state.disks)?;
        frame.ram.in_use().map_err(no_memory)?;
        phases.mark_first(Phases::STATE_RESTORED);
        frame.finish(host, state.cmdline.clone(), VcpuState::Paused)
    }
}
