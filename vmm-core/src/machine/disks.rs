//! Disks that come and go while a machine runs.
//!
//! A slot is a virtio-mmio device without a device: registers that read as a placeholder, and
//! nothing else. So slots cost neither a boot nor a clone anything; interrupt, notification
//! and block device come with the disk. The guest finds it when its agent binds the driver to
//! the slot.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::bus::BusDevice;
use devices::transport::mmio::{MmioSlot, MmioState, MmioTransport};
use devices::virtio::block::{
    AttachError, Backing, BackingError, BackingOptions, Block, BlockConfig, BlockHandle,
    ConfigError, DetachError,
};
use devices::virtio::{GuestMemory, Runner, StateError};
use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::MmioDevice;
use crate::bus::Bus;
use crate::kvm_vm::KvmVm;
use crate::vm::Disk;

use super::wiring;

/// A disk cannot be plugged in or out.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A disk is plugged in already.
    #[error("disk slot {0} is in use")]
    InUse(usize),
    /// There is no disk.
    #[error("disk slot {0} is empty")]
    Empty(usize),
    /// The file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The device.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file does not suit the device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The file is in use.
    #[error(transparent)]
    Detach(#[from] DetachError),
    /// Connecting it.
    #[error("cannot connect the disk")]
    Connect(#[source] io::Error),
    /// Its saved state.
    #[error("cannot restore the disk of slot {slot}")]
    Restore {
        /// Which.
        slot: usize,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The saved machine had other disks.
    #[error("the snapshot has {} in disk slot {slot}, this machine has {}", disk(*saved), disk(!*saved))]
    Mismatch {
        /// Which.
        slot: usize,
        /// Whether the saved machine had one there.
        saved: bool,
    },
}

fn disk(there: bool) -> &'static str {
    if there { "a disk" } else { "none" }
}

/// All disk slots of a machine.
#[derive(Debug)]
pub(super) struct Disks {
    vm: Arc<KvmVm>,
    memory: GuestMemory,
    runner: Arc<dyn Runner>,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    registers: Arc<MmioSlot>,
    place: MmioDevice,
    number: u32,
    plugged: Mutex<Option<Plugged>>,
}

/// A disk in its slot. Fields drop in order.
#[derive(Debug)]
struct Plugged {
    transport: Arc<MmioTransport>,
    handle: BlockHandle,
    _notify: Notification,
    _line: InterruptLine,
}

impl Disks {
    /// Puts `count` empty slots on the bus, behind the `fixed` devices that are there.
    pub(super) fn new(
        vm: Arc<KvmVm>,
        memory: GuestMemory,
        runner: Arc<dyn Runner>,
        fixed: usize,
        count: usize,
        mmio: &mut Bus,
    ) -> io::Result<Self> {
        let mut slots = Vec::with_capacity(count);
        for index in 0..count {
            let number = fixed.saturating_add(index);
            let place = wiring::disk_slot(fixed, index)?;
            let registers = Arc::new(MmioSlot::new());
            let start = u64::from(place.address);
            let end = start.saturating_add(MmioTransport::BYTES);
            let device: Arc<dyn BusDevice> = registers.clone();
            mmio.insert(start..end, device).map_err(io::Error::other)?;
            slots.push(Slot {
                registers,
                place,
                number: u32::try_from(number).map_err(io::Error::other)?,
                plugged: Mutex::new(None),
            });
        }
        Ok(Self {
            vm,
            memory,
            runner,
            slots,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Where the guest finds the slots.
    pub(super) fn places(&self) -> impl Iterator<Item = MmioDevice> {
        self.slots.iter().map(|slot| slot.place)
    }

    /// Plugs a disk in; returns the number of its virtio-mmio device. Blocks.
    pub(super) fn plug(&self, index: usize, disk: &Disk) -> Result<u32, DiskError> {
        let slot = self.slot(index)?;
        let mut place = lock(slot);
        if place.is_some() {
            return Err(DiskError::InUse(index));
        }
        let plugged = self.connect(slot, index, disk)?;
        slot.registers.plug(Arc::clone(&plugged.transport));
        *place = Some(plugged);
        Ok(slot.number)
    }

    /// Takes a disk out: new requests fail, and those in flight have `deadline` to finish.
    /// Its file is closed afterwards. Blocks.
    pub(super) fn unplug(&self, index: usize, deadline: Duration) -> Result<(), DiskError> {
        let slot = self.slot(index)?;
        let mut place = lock(slot);
        let plugged = place.as_ref().ok_or(DiskError::Empty(index))?;
        match plugged.handle.detach(deadline) {
            // Of an earlier try, whose deadline passed.
            Ok(()) | Err(DetachError::Empty | DetachError::Notify(_)) => {}
            Err(err) => return Err(err.into()),
        }
        slot.registers.unplug();
        plugged.transport.reset();
        *place = None;
        Ok(())
    }

    /// Stops all disks; the guest no longer runs.
    pub(super) fn reset(&self) {
        for slot in &self.slots {
            if let Some(plugged) = &*lock(slot) {
                plugged.transport.reset();
            }
        }
    }

    /// Lets disks that stand still go on.
    pub(super) fn resume(&self) -> Result<(), StateError> {
        for slot in &self.slots {
            if let Some(plugged) = &*lock(slot) {
                plugged.transport.resume()?;
            }
        }
        Ok(())
    }

    /// What a snapshot keeps, slot by slot.
    pub(super) fn save(&self) -> Result<Vec<Option<MmioState>>, StateError> {
        let save = |slot: &Slot| {
            let place = lock(slot);
            place
                .as_ref()
                .map(|plugged| plugged.transport.save())
                .transpose()
        };
        self.slots.iter().map(save).collect()
    }

    /// Lets the disks that were plugged in go on where the snapshot was taken.
    pub(super) fn restore(&self, saved: &[Option<MmioState>]) -> Result<(), DiskError> {
        for (index, slot) in self.slots.iter().enumerate() {
            let saved = saved.get(index).and_then(Option::as_ref);
            match (saved, &*lock(slot)) {
                (None, None) => {}
                (Some(saved), Some(plugged)) => {
                    plugged
                        .transport
                        .restore(saved)
                        .map_err(|source| DiskError::Restore {
                            slot: index,
                            source,
                        })?;
                }
                (saved, _) => {
                    return Err(DiskError::Mismatch {
                        slot: index,
                        saved: saved.is_some(),
                    });
                }
            }
        }
        Ok(())
    }

    fn slot(&self, index: usize) -> Result<&Slot, DiskError> {
        self.slots.get(index).ok_or(DiskError::Empty(index))
    }

    fn connect(&self, slot: &Slot, index: usize, disk: &Disk) -> Result<Plugged, DiskError> {
        let options = BackingOptions {
            read_only: disk.read_only,
            direct: disk.direct,
        };
        let backing = Backing::open(&disk.path, options)?;
        backing.lock()?;
        let config = BlockConfig {
            name: format!("blk{index}"),
            serial: disk.serial.clone(),
            read_only: disk.read_only,
            block_size: backing.block_size(),
            ..BlockConfig::default()
        };
        let (block, handle) = Block::new(config)?;
        handle.attach(backing)?;
        let line = InterruptLine::new(&self.vm, slot.place.irq).map_err(DiskError::Connect)?;
        let transport = MmioTransport::new(
            Box::new(block),
            Arc::clone(&self.memory),
            Arc::clone(&self.runner),
            Arc::clone(&line.event) as _,
        )
        .map_err(DiskError::Connect)?;
        let notify = Notification::new(&self.vm, slot.place, &transport);
        Ok(Plugged {
            transport: Arc::new(transport),
            handle,
            _notify: notify.map_err(DiskError::Connect)?,
            _line: line,
        })
    }
}

fn lock(slot: &Slot) -> MutexGuard<'_, Option<Plugged>> {
    slot.plugged.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd that raises an interrupt line, until it is dropped.
#[derive(Debug)]
struct InterruptLine {
    vm: Arc<KvmVm>,
    event: Arc<EventFd>,
    irq: u32,
}

impl InterruptLine {
    fn new(vm: &Arc<KvmVm>, irq: u32) -> io::Result<Self> {
        Ok(Self {
            event: Arc::new(wiring::irq_line(vm, irq)?),
            vm: Arc::clone(vm),
            irq,
        })
    }
}

impl Drop for InterruptLine {
    fn drop(&mut self) {
        if let Err(err) = self.vm.fd().unregister_irqfd(&self.event, self.irq) {
            tracing::warn!(%err, irq = self.irq, "an interrupt line stays connected");
        }
    }
}

/// The kernel's delivery of the driver's notifications, until it is dropped.
#[derive(Debug)]
struct Notification {
    vm: Arc<KvmVm>,
    address: u64,
    events: Vec<EventFd>,
}

impl Notification {
    fn new(vm: &Arc<KvmVm>, place: MmioDevice, transport: &MmioTransport) -> io::Result<Self> {
        let mut this = Self {
            vm: Arc::clone(vm),
            address: wiring::notify_address(place),
            events: Vec::new(),
        };
        for (queue, event) in (0_u32..).zip(transport.queue_notifies()) {
            let address = IoEventAddress::Mmio(this.address);
            vm.fd().register_ioevent(event, &address, queue)?;
            this.events.push(event.try_clone()?);
        }
        Ok(this)
    }
}

impl Drop for Notification {
    fn drop(&mut self) {
        for (queue, event) in (0_u32..).zip(&self.events) {
            let address = IoEventAddress::Mmio(self.address);
            if let Err(err) = self.vm.fd().unregister_ioevent(event, &address, queue) {
                tracing::warn!(%err, queue, "a disk's notifications stay connected");
            }
        }
    }
}
