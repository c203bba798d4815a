use vmm_sys_util::eventfd::EventFd;

use crate::transport::queue::{Position, QueueRegisters};
use crate::virtio::{ActiveQueue, GuestMemory};

use super::memory::MemoryTable;

/// One queue as the front-end sets it up.
#[derive(Debug)]
pub(super) struct Ring {
    max_size: u16,
    size: u32,
    /// Descriptor table, available ring, used ring, as the front-end addresses them.
    user: Option<[u64; 3]>,
    /// Entry of the available ring to go on with.
    pub(super) base: u16,
    pub(super) kick: Option<EventFd>,
    pub(super) enabled: bool,
}

impl Ring {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            user: None,
            base: 0,
            kick: None,
            enabled: false,
        }
    }

    /// `None` when the device has no queue of that size.
    pub(super) fn set_size(&mut self, size: u32) -> Option<()> {
        let valid = size <= u32::from(self.max_size) && size.is_power_of_two();
        valid.then(|| self.size = size)
    }

    pub(super) fn set_addresses(&mut self, descriptors: u64, available: u64, used: u64) {
        self.user = Some([descriptors, available, used]);
    }

    /// Whether everything is known that serving it takes.
    pub(super) fn is_complete(&self) -> bool {
        self.user.is_some() && self.kick.is_some()
    }

    /// The queue for the device, and a clone of its kick.
    pub(super) fn activate(
        &self,
        index: u16,
        table: &MemoryTable,
        memory: &GuestMemory,
        event_idx: bool,
    ) -> Result<ActiveQueue, String> {
        let [desc, driver, device] = self.user.ok_or("its addresses are not set")?;
        let place = |user| {
            table
                .guest_address(user)
                .ok_or_else(|| format!("address {user:#x} is in no region"))
        };
        let mut registers = QueueRegisters::new(self.max_size);
        registers.set_size(self.size);
        registers.desc = place(desc)?;
        registers.driver = place(driver)?;
        registers.device = place(device)?;
        let queue = registers
            .build(memory, event_idx, Position::At(self.base))
            .map_err(|err| err.to_string())?;
        let kick = self.kick.as_ref().ok_or("it has no kick")?;
        let notify = kick.try_clone().map_err(|err| err.to_string())?;
        Ok(ActiveQueue {
            index,
            queue,
            notify,
        })
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Where the device, which has been quiesced, stopped.
    pub(super) fn stopped(&mut self, used: u16) {
        self.base = used;
    }
}
