//! The devices of a machine, in the order in which its guest finds them.

use std::io;

use devices::virtio::VirtioDevice;
use devices::virtio::fs::{Fs, FsHandle};
use devices::virtio::net::{ConfigError, Net, NetConfig, NetHandle};
use devices::virtio::vsock::{Vsock, VsockConfig, VsockHandle};

use crate::vm::Disk;

/// A device and what to call it in errors and logs.
#[derive(Debug)]
pub struct NamedDevice {
    /// For errors and logs.
    pub name: String,
    /// The model.
    pub device: Box<dyn VirtioDevice>,
}

/// Devices of one machine. A machine that is restored needs the same ones, in the same
/// order, as the machine that was saved; what is behind them may differ.
#[derive(Debug, Default)]
pub struct DeviceSet {
    pub(crate) devices: Vec<NamedDevice>,
    pub(crate) share: Option<FsHandle>,
    pub(crate) vsock: Option<VsockHandle>,
    pub(crate) nets: Vec<NetHandle>,
    pub(crate) balloon: bool,
    pub(crate) hotplug_bytes: u64,
    pub(crate) disks: Vec<Option<Disk>>,
}

/// Names of the devices that a machine makes itself, around its memory.
pub(crate) const BALLOON: &str = "balloon";
pub(crate) const MEM: &str = "mem";

impl DeviceSet {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device.
    #[must_use]
    pub fn with_device(mut self, name: impl Into<String>, device: Box<dyn VirtioDevice>) -> Self {
        self.devices.push(NamedDevice {
            name: name.into(),
            device,
        });
        self
    }

    /// Adds a file system device, which [`crate::Machine::adopt`] can give another tree. A
    /// machine has one such: the last added.
    #[must_use]
    pub fn with_share(mut self, share: Fs) -> Self {
        self.share = Some(share.handle());
        self.with_device("share", Box::new(share))
    }

    /// Adds an entropy device fed by the host.
    ///
    /// # Errors
    /// When the host's entropy source cannot be opened.
    pub fn with_rng(self) -> io::Result<Self> {
        let rng = devices::virtio::rng::Rng::new()?;
        Ok(self.with_device("rng", Box::new(rng)))
    }

    /// Adds the socket device, which makes [`crate::vm::Vm::connect`] and
    /// [`crate::vm::Vm::listen`] work. A machine has one: these calls use the last added.
    ///
    /// # Errors
    /// When the device cannot get its fds or its Unix socket.
    pub fn with_vsock(mut self, config: VsockConfig) -> io::Result<Self> {
        let (vsock, handle) = Vsock::new(config)?;
        self.vsock = Some(handle);
        Ok(self.with_device("vsock", Box::new(vsock)))
    }

    /// Adds a network slot: a card without a tap, its link down until
    /// [`crate::vm::Vm::attach_nic`] plugs one in. Slots count from 0 in the order in which
    /// they are added, which is also the order in which a guest numbers its cards.
    ///
    /// # Errors
    /// Names what cannot be built.
    pub fn with_net(mut self, config: NetConfig) -> Result<Self, ConfigError> {
        let (net, handle) = Net::new(config)?;
        let name = format!("net{}", self.nets.len());
        self.nets.push(handle);
        Ok(self.with_device(name, Box::new(net)))
    }

    /// Adds a balloon through which the guest reports free pages, which go back to the host.
    #[must_use]
    pub fn with_balloon(mut self) -> Self {
        self.balloon = true;
        self
    }

    /// Adds a memory device that can give the guest `bytes` more while it runs, a multiple of
    /// [`crate::memory::HOTPLUG_ALIGN_BYTES`]: [`crate::vm::Vm::resize`]. None for zero.
    #[must_use]
    pub fn with_hotplug_memory(mut self, bytes: u64) -> Self {
        self.hotplug_bytes = bytes;
        self
    }

    /// What the memory device can add.
    #[must_use]
    pub fn hotplug_bytes(&self) -> u64 {
        self.hotplug_bytes
    }

    /// Names of all devices in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let own = [
            self.balloon.then_some(BALLOON),
            (self.hotplug_bytes > 0).then_some(MEM),
        ];
        let added = self.devices.iter().map(|device| device.name.clone());
        added
            .chain(own.into_iter().flatten().map(str::to_owned))
            .collect()
    }

    /// Adds `count` disk slots, which [`crate::vm::Vm::attach_disk`] plugs disks into. They
    /// come behind all devices.
    #[must_use]
    pub fn with_disk_slots(mut self, count: usize) -> Self {
        let slots = self.disks.len().saturating_add(count);
        self.disks.resize(slots, None);
        self
    }

    /// Plugs a disk into slot `slot` from the beginning: what a machine that is restored needs
    /// for each disk that the saved one had. A slot that there is not is ignored.
    #[must_use]
    pub fn with_disk(mut self, slot: usize, disk: Disk) -> Self {
        if let Some(place) = self.disks.get_mut(slot) {
            *place = Some(disk);
        }
        self
    }

    /// How many disk slots.
    #[must_use]
    pub fn disk_slots(&self) -> usize {
        self.disks.len()
    }

    /// How many, without the disk slots.
    #[must_use]
    pub fn len(&self) -> usize {
        let own = usize::from(self.balloon).saturating_add((self.hotplug_bytes > 0).into());
        self.devices.len().saturating_add(own)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
