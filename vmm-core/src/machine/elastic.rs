//! Memory that comes and goes: the balloon and the memory device, and changes of size.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::mem::{Mem, MemConfig, MemHandle};
use devices::virtio::release::{HostPages, PageReleaser};
use tokio::time::timeout;

use super::{BuildError, Machine};
use crate::device_set::{BALLOON, MEM, NamedDevice};
use crate::memory::GuestRam;
use crate::vm::{ExitReason, VmError, VmSize};

/// The devices around a machine's memory.
pub(super) struct Elastic {
    pub(super) devices: Vec<NamedDevice>,
    pub(super) mem: Option<MemHandle>,
}

impl Elastic {
    pub(super) fn new(
        ram: &GuestRam,
        balloon: bool,
        hotplug_bytes: u64,
    ) -> Result<Self, BuildError> {
        let releaser: Arc<dyn PageReleaser> =
            Arc::new(HostPages::new(Arc::clone(ram.guest_memory())));
        let mut this = Self {
            devices: Vec::new(),
            mem: None,
        };
        let failed = |name: &str, source| BuildError::Device {
            name: name.to_owned(),
            source,
        };
        if balloon {
            let mut config = BalloonConfig::new(ram.size().total_bytes());
            config.stats = false;
            let (device, _) = Balloon::new(config, Arc::clone(&releaser))
                .map_err(|source| failed(BALLOON, source))?;
            this.add(BALLOON, Box::new(device));
        }
        if hotplug_bytes > 0 {
            let config = MemConfig::new(ram.size().hotplug_start(), hotplug_bytes);
            let (device, handle) = Mem::new(&config, releaser)
                .map_err(|err| failed(MEM, io::Error::new(io::ErrorKind::InvalidInput, err)))?;
            this.mem = Some(handle);
            this.add(MEM, Box::new(device));
        }
        Ok(this)
    }

    fn add(&mut self, name: &str, device: Box<dyn devices::virtio::VirtioDevice>) {
        self.devices.push(NamedDevice {
            name: name.to_owned(),
            device,
        });
    }
}

impl Machine {
    /// Memory that the guest has now.
    pub(super) fn memory_bytes_now(&self) -> u64 {
        let plugged = self.mem.as_ref().map_or(0, MemHandle::plugged);
        self.memory_bytes.saturating_add(plugged)
    }

    pub(super) fn size_limits(&self) -> Option<(VmSize, VmSize)> {
        let live = self.live()?;
        let vcpus = u32::try_from(live.members.len()).unwrap_or(u32::MAX);
        let hotplug = live.vm.ram().map_or(0, |ram| ram.size().hotplug_bytes);
        let size = |memory_bytes| VmSize {
            vcpus,
            memory_bytes,
        };
        let most = self.memory_bytes.saturating_add(hotplug);
        Some((size(self.memory_bytes_now()), size(most)))
    }

    pub(super) async fn change_size(
        &self,
        wanted: VmSize,
        deadline: Duration,
    ) -> Result<VmSize, VmError> {
        let gone = || VmError::Exited(self.exit.get().unwrap_or(ExitReason::Stopped));
        let (now, most) = self.size_limits().ok_or_else(gone)?;
        let within = |what, value: u64, least: u64, most: u64| {
            let fits = (least..=most).contains(&value);
            fits.then_some(()).ok_or(VmError::Size {
                what,
                value,
                least,
                most,
            })
        };
        within("vcpus", wanted.vcpus.into(), 1, most.vcpus.into())?;
        let memory = (wanted.memory_bytes, self.memory_bytes, most.memory_bytes);
        within("memory_bytes", memory.0, memory.1, memory.2)?;
        let Some(mem) = &self.mem else {
            return Ok(now);
        };
        let more = wanted.memory_bytes.saturating_sub(self.memory_bytes);
        let more = more.next_multiple_of(MemConfig::BLOCK_BYTES);
        let mut status = mem.subscribe();
        mem.set_requested(more)
            .map_err(|err| VmError::Backend(Box::new(err)))?;
        let mut exited = self.exit.subscribe();
        // As far as it comes: a guest gives up only memory that it does not use.
        let plugged = status.wait_for(|status| status.plugged_bytes == more);
        let reached = async {
            tokio::select! {
                _ = plugged => Ok(()),
                _ = exited.wait_for(Option::is_some) => Err(gone()),
            }
        };
        timeout(deadline, reached).await.unwrap_or(Ok(()))?;
        Ok(VmSize {
            vcpus: now.vcpus,
            memory_bytes: self.memory_bytes_now(),
        })
    }
}
