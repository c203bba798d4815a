use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::stat::{SFlag, fstat};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Calls;
use super::memory::{MAX_REGIONS, MemoryError, MemoryTable};
use super::ring::Ring;
use crate::virtio::{Activation, DeviceType, Interrupt, Runner, VirtioDevice};

/// Bit 30 of the features: this protocol's own, not the driver's.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// QEMU's virtio-mmio lets drivers have rings of this size, whatever the device offers.
const VMM_RING_SIZE: u16 = 1024;
/// Most bytes of configuration space read or written by one message (the protocol's limit).
const MAX_CONFIG_BYTES: u32 = 256;

/// One device and what its front-end has told of itself.
#[derive(Debug)]
pub(super) struct Backend {
    state: Mutex<State>,
    calls: Arc<Calls>,
    runner: Arc<dyn Runner>,
    /// Rings that the front-end drives; it may keep the last ones to itself.
    driven: usize,
}

#[derive(Debug)]
struct State {
    device: Box<dyn VirtioDevice>,
    features: Option<u64>,
    table: MemoryTable,
    rings: Vec<Ring>,
    /// The device runs.
    active: bool,
}

impl Backend {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        driven: usize,
        runner: Arc<dyn Runner>,
    ) -> Self {
        let least = match device.device_type() {
            // It has as many requests in flight as its queues have entries.
            DeviceType::Block => 0,
            _ => VMM_RING_SIZE,
        };
        let sizes = device.queue_sizes().iter();
        let rings: Vec<Ring> = sizes.map(|size| Ring::new(*size.max(&least))).collect();
        Self {
            calls: Arc::new(Calls::new(device.device_type().name(), rings.len())),
            driven: driven.clamp(1, rings.len().max(1)),
            state: Mutex::new(State {
                device,
                features: None,
                table: MemoryTable::default(),
                rings,
                active: false,
            }),
            runner,
        }
    }

    /// Back to what it was before there was a front-end.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.reset();
        state.features = None;
        state.table = MemoryTable::default();
        self.calls.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic in a device its process tells the owner and ends.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_ring(&self, index: u32, set: impl FnOnce(&mut Ring) -> Option<()>) -> Result<()> {
        let mut state = self.lock();
        state.quiesce();
        let ring = state.ring(index).ok_or(Error::InvalidParam)?;
        set(ring).ok_or(Error::InvalidParam)?;
        self.start(&mut state)
    }

    /// Lets the device run once all its rings can.
    fn start(&self, state: &mut State) -> Result<()> {
        let Some(features) = state.features else {
            return Ok(());
        };
        let driven = state.rings.get(..self.driven).unwrap_or_default();
        // Rings are enabled from the start for front-ends without the protocol's features.
        let enabled = |ring: &Ring| ring.enabled || features & PROTOCOL_FEATURES == 0;
        let ready = driven
            .iter()
            .all(|ring| ring.is_complete() && enabled(ring));
        if state.active || !ready || self.calls.is_broken() {
            return Ok(());
        }
        let activated = self.activate(state, features & !PROTOCOL_FEATURES);
        if let Err(why) = activated {
            self.calls.needs_reset(&why);
            return Err(Error::ReqHandlerError(io::Error::other(why)));
        }
        state.active = true;
        Ok(())
    }

    fn activate(&self, state: &mut State, features: u64) -> std::result::Result<(), String> {
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err("the driver is a legacy one".to_owned());
        }
        let memory = state.table.memory().map_err(|err| err.to_string())?;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.driven);
        for (index, ring) in (0_u16..).zip(state.rings.iter().take(self.driven)) {
            let queue = ring
                .activate(index, &state.table, &memory, event_idx)
                .map_err(|why| format!("queue {index}: {why}"))?;
            queues.push(queue);
        }
        let kicks: Vec<EventFd> = queues
            .iter()
            .filter_map(|queue| queue.notify.try_clone().ok())
            .collect();
        let activation = Activation {
            memory,
            queues,
            interrupt: Arc::clone(&self.calls) as Arc<dyn Interrupt>,
            features,
            runner: Arc::clone(&self.runner),
        };
        let activated = state.device.activate(activation);
        activated.map_err(|err| err.to_string())?;
        for kick in kicks {
            // What became available while nobody looked.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Changes guest memory, with the device standing still meanwhile.
    fn change_memory(
        &self,
        change: impl FnOnce(&mut MemoryTable) -> std::result::Result<(), MemoryError>,
    ) -> Result<()> {
        let mut state = self.lock();
        state.quiesce();
        let changed = change(&mut state.table).and_then(|()| state.table.memory().map(drop));
        changed.map_err(|err| Error::ReqHandlerError(io::Error::other(err)))?;
        self.start(&mut state)
    }
}

impl State {
    fn ring(&mut self, index: u32) -> Option<&mut Ring> {
        self.rings.get_mut(usize::try_from(index).ok()?)
    }

    /// Stops the device with nothing lost; its rings can be started again.
    fn quiesce(&mut self) {
        if !std::mem::take(&mut self.active) {
            return;
        }
        self.device.quiesce();
        let Ok(memory) = self.table.memory() else {
            return;
        };
        for (index, ring) in (0_u16..).zip(&mut self.rings) {
            // A quiesced device has used every chain that it took.
            let used = ring
                .activate(index, &self.table, &memory, false)
                .ok()
                .and_then(|active| active.queue.used_idx(&*memory, Ordering::Acquire).ok());
            if let Some(used) = used {
                ring.stopped(used.0);
            }
        }
    }

    fn reset(&mut self) {
        self.active = false;
        self.device.reset();
        for ring in &mut self.rings {
            *ring = Ring::new(ring.max_size());
        }
    }
}

/// An eventfd of the front-end, made non-blocking. Nothing else is taken: reading another
/// kind of file could block the event loop.
fn eventfd(file: File) -> Result<EventFd> {
    let kind = fstat(&file).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
    // Anonymous inodes have no type.
    if kind != Ok(SFlag::empty()) || !is_eventfd(&file) {
        return Err(Error::IncorrectFds);
    }
    let nonblocking = rustix::fs::fcntl_getfl(&file)
        .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK));
    nonblocking.map_err(|err| Error::ReqHandlerError(err.into()))?;
    // SAFETY: the fd is owned by `file`, which gives it up here.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

fn is_eventfd(file: &File) -> bool {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::read_link(link).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandler for Backend {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&self) -> Result<()> {
        let mut state = self.lock();
        state.reset();
        self.calls.mend();
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.lock().device.features() | PROTOCOL_FEATURES)
    }

    fn set_features(&self, features: u64) -> Result<()> {
        let mut state = self.lock();
        if features & !(state.device.features() | PROTOCOL_FEATURES) != 0 {
            return Err(Error::InvalidParam);
        }
        // Said again with each start, and with logging of dirty pages turned on.
        if state.features != Some(features) {
            state.quiesce();
            state.features = Some(features);
        }
        self.start(&mut state)
    }

    fn set_mem_table(&self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let table = MemoryTable::new(regions, files)
            .map_err(|err| Error::ReqHandlerError(io::Error::other(err)))?;
        self.change_memory(|old| {
            *old = table;
            Ok(())
        })
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.with_ring(index, |ring| ring.set_size(num))
    }

    fn set_vring_addr(
        &self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return unsupported("log dirty pages");
        }
        self.with_ring(index, |ring| {
            ring.set_addresses(descriptor, available, used);
            Some(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.with_ring(index, |ring| {
            ring.base = base;
            Some(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let mut state = self.lock();
        state.quiesce();
        let ring = state.ring(index).ok_or(Error::InvalidParam)?;
        ring.kick = None;
        let base = ring.base.into();
        self.calls
            .set_call(u16::try_from(index).map_err(|_| Error::InvalidParam)?, None);
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        // Without one the back-end would have to poll the ring.
        let kick = eventfd(fd.ok_or(Error::IncorrectFds)?)?;
        self.with_ring(index.into(), |ring| {
            ring.kick = Some(kick);
            Some(())
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.map(eventfd).transpose()?;
        self.calls.set_call(index.into(), call);
        Ok(())
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        let error = fd.map(eventfd).transpose()?;
        self.calls.set_error(index.into(), error);
        Ok(())
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.lock().rings.len() as u64)
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.with_ring(index, |ring| {
            ring.enabled = enable;
            Some(())
        })
    }

    fn get_config(&self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if size > MAX_CONFIG_BYTES || offset > MAX_CONFIG_BYTES {
            return Err(Error::InvalidParam);
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| Error::InvalidParam)?];
        self.lock().device.read_config(offset.into(), &mut bytes);
        Ok(bytes)
    }

    fn set_config(&self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        if offset > MAX_CONFIG_BYTES {
            return Err(Error::InvalidParam);
        }
        self.lock().device.write_config(offset.into(), bytes);
        Ok(())
    }

    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        unsupported("be a graphics card")
    }

    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported("share objects")
    }

    fn get_inflight_fd(&self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("track requests in flight")
    }

    fn set_inflight_fd(&self, _: &VhostUserInflight, _: File) -> Result<()> {
        unsupported("track requests in flight")
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(&self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        self.change_memory(|table| table.add(region, file))
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_memory(|table| table.remove(region))
    }

    fn set_device_state_fd(
        &self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported("transfer its state")
    }

    fn check_device_state(&self) -> Result<()> {
        unsupported("transfer its state")
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        unsupported("map shared memory")
    }

    fn set_log_base(&self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported("log dirty pages")
    }
}
