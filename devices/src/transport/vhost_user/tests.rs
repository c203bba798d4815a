//! A front-end of the `vhost` crate drives devices over a socket.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VhostUserServer;
use crate::testing::{Buffer, PATIENCE, TestGuest, TestRunner, Used, VirtQueueDriver};
use crate::virtio::VirtioDevice;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConfig};

const BYTES: u64 = 4 << 20;
const MEMORY: usize = 4 << 20;
/// Where the front-end has guest memory in its own address space.
const USER: u64 = 0x7f00_0000_0000;
const PROTOCOL: u64 = 1 << 30;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A served device, and where.
struct Served {
    server: Option<VhostUserServer>,
    runner: TestRunner,
    dir: TempDir,
}

impl Served {
    fn new(device: impl VirtioDevice + 'static, driven: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let runner = TestRunner::start();
        let server =
            VhostUserServer::serve(Box::new(device), driven, listener, runner.runner()).unwrap();
        Self {
            server: Some(server),
            runner,
            dir,
        }
    }

    fn rng() -> Self {
        Self::new(Rng::new().unwrap(), 1)
    }

    fn vsock() -> Self {
        Self::new(Vsock::new(VsockConfig::new(77)).unwrap().0, 2)
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("s")).unwrap()
    }

    fn vmm(&self) -> Vmm {
        Vmm::connect(self.stream())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server = None;
        self.runner.shutdown();
        if !std::thread::panicking() {
            assert_eq!(self.runner.failures(), Vec::<String>::new());
        }
    }
}

/// A VMM with a guest in it.
struct Vmm {
    frontend: Frontend,
    guest: TestGuest,
    memory: File,
    queues: Vec<VirtQueueDriver>,
    calls: Vec<EventFd>,
}

impl Vmm {
    fn connect(stream: UnixStream) -> Self {
        let (guest, memory) = TestGuest::shared(MEMORY);
        let mut frontend = Frontend::from_stream(stream, 8);
        frontend.set_owner().unwrap();
        assert_ne!(frontend.get_features().unwrap() & PROTOCOL, 0);
        let offered = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(
                VhostUserProtocolFeatures::CONFIG
                    | VhostUserProtocolFeatures::REPLY_ACK
                    | VhostUserProtocolFeatures::MQ
                    | VhostUserProtocolFeatures::RESET_DEVICE
                    | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            )
            .unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::CONFIG));
        // Every request is answered, so that errors are seen where they happen.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Self {
            frontend,
            guest,
            memory,
            queues: Vec::new(),
            calls: Vec::new(),
        }
    }

    fn region(&self, guest_phys_addr: u64, size: u64, offset: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: size,
            userspace_addr: USER + guest_phys_addr,
            mmap_offset: offset,
            mmap_handle: self.memory.as_raw_fd(),
        }
    }

    /// Sets everything up with `count` queues and lets the device run.
    fn start(&mut self, count: usize) {
        self.frontend.set_features(VERSION_1 | PROTOCOL).unwrap();
        self.frontend
            .set_mem_table(&[self.region(0, BYTES, 0)])
            .unwrap();
        for index in 0..count {
            self.queues.push(VirtQueueDriver::new(&self.guest, 16));
            self.calls.push(EventFd::new(EFD_NONBLOCK).unwrap());
            self.start_ring(index, 0);
        }
    }

    fn start_ring(&self, index: usize, base: u16) {
        self.describe_ring(index, base);
        let frontend = &self.frontend;
        frontend
            .set_vring_kick(index, self.queues[index].notify())
            .unwrap();
        self.enable(index, true);
    }

    fn describe_ring(&self, index: usize, base: u16) {
        let (queue, frontend) = (&self.queues[index], &self.frontend);
        frontend.set_vring_num(index, queue.size()).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        let (desc, avail, used) = queue.addresses();
        let addresses = VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: USER + desc,
            used_ring_addr: USER + used,
            avail_ring_addr: USER + avail,
            log_addr: None,
        };
        frontend.set_vring_addr(index, &addresses).unwrap();
        frontend.set_vring_call(index, &self.calls[index]).unwrap();
    }

    fn enable(&self, index: usize, enable: bool) {
        // The crate takes `&mut`, for no reason of its own.
        let mut frontend = self.frontend.clone();
        frontend.set_vring_enable(index, enable).unwrap();
    }

    fn ask(&mut self, queue: usize) {
        self.queues[queue].add(&[Buffer::Writable(64)]);
        self.queues[queue].kick();
    }

    /// Waits for what the device has used; it may call without having used anything.
    fn answer(&mut self, queue: usize) -> Used {
        self.answer_within(queue, PATIENCE).expect("an answer")
    }

    fn answer_within(&mut self, queue: usize, limit: Duration) -> Option<Used> {
        let call = &self.calls[queue];
        loop {
            // One call may tell of several.
            if let Some(used) = self.queues[queue].pop_used() {
                return Some(used);
            }
            if !is_readable(call, limit) {
                return None;
            }
            call.read().unwrap();
        }
    }

    /// Lets some time pass, in which nothing may be used.
    fn expect_silence(&mut self, queue: usize) {
        let used = self.answer_within(queue, Duration::from_millis(50));
        assert_eq!(used, None);
    }
}

fn is_readable(event: &EventFd, limit: Duration) -> bool {
    // SAFETY: the eventfd is open for the whole call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let limit = PollTimeout::try_from(limit).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], limit).unwrap() > 0
}

#[test]
fn a_device_is_served_over_a_socket() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.start(1);
    for _ in 0..40 {
        vmm.ask(0);
        let used = vmm.answer(0);
        assert_eq!(used.len, 64);
        assert!(used.data.iter().any(|byte| *byte != 0));
    }
}

#[test]
fn the_configuration_space_is_read() {
    let served = Served::vsock();
    let mut vmm = served.vmm();
    let flags = VhostUserConfigFlags::empty();
    let (_, cid) = vmm.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(cid, 77_u64.to_le_bytes());
}

#[test]
fn a_vmm_may_keep_the_last_queue_to_itself() {
    let served = Served::vsock();
    let mut vmm = served.vmm();
    vmm.start(2);
    // A connect to a port where nobody listens is answered by a reset.
    vmm.queues[0].add(&[Buffer::Writable(4096)]);
    let mut packet = Vec::new();
    packet.extend(77_u64.to_le_bytes());
    packet.extend(2_u64.to_le_bytes());
    for value in [1000_u32, 2000, 0] {
        packet.extend(value.to_le_bytes());
    }
    packet.extend([1_u16, 1].iter().flat_map(|value| value.to_le_bytes()));
    packet.extend([0; 12]);
    vmm.queues[1].add(&[Buffer::Readable(packet)]);
    vmm.queues[1].kick();
    let used = vmm.answer(0);
    assert_eq!(used.len, 44);
    assert_eq!(
        used.data[30..32],
        3_u16.to_le_bytes(),
        "VIRTIO_VSOCK_OP_RST"
    );
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.start(1);
    vmm.ask(0);
    vmm.answer(0);
    let base = vmm.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 1);
    vmm.ask(0);
    vmm.expect_silence(0);
    vmm.start_ring(0, 1);
    assert_eq!(vmm.answer(0).len, 64);
}

#[test]
fn a_disabled_ring_stands_still() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.start(1);
    vmm.enable(0, false);
    vmm.ask(0);
    vmm.expect_silence(0);
    vmm.enable(0, true);
    assert_eq!(vmm.answer(0).len, 64);
}

#[test]
fn rings_run_without_being_enabled_for_a_front_end_of_old() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.frontend.set_features(VERSION_1).unwrap();
    let region = vmm.region(0, BYTES, 0);
    vmm.frontend.set_mem_table(&[region]).unwrap();
    vmm.queues.push(VirtQueueDriver::new(&vmm.guest, 16));
    vmm.calls.push(EventFd::new(EFD_NONBLOCK).unwrap());
    vmm.describe_ring(0, 0);
    let kick = vmm.queues[0].notify();
    vmm.frontend.set_vring_kick(0, kick).unwrap();
    vmm.ask(0);
    assert_eq!(vmm.answer(0).len, 64);
}

#[test]
fn a_late_call_is_told_what_it_missed() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.start(1);
    let masked = EventFd::new(EFD_NONBLOCK).unwrap();
    vmm.frontend.set_vring_call(0, &masked).unwrap();
    vmm.ask(0);
    assert!(is_readable(&masked, PATIENCE));
    let call = &vmm.calls[0];
    vmm.frontend.set_vring_call(0, call).unwrap();
    // Its reply says that the message before has been seen, which has none.
    vmm.frontend.get_features().unwrap();
    vmm.ask(0);
    vmm.answer(0);
    vmm.answer(0);
}

#[test]
fn the_next_vmm_finds_the_device_reset() {
    let served = Served::rng();
    for _ in 0..3 {
        let mut vmm = served.vmm();
        vmm.start(1);
        vmm.ask(0);
        vmm.answer(0);
    }
    let mut vmm = served.vmm();
    vmm.start(1);
    vmm.frontend.reset_device().unwrap();
    vmm.ask(0);
    vmm.expect_silence(0);
}

#[test]
fn memory_is_added_and_removed_while_the_device_runs() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.start(1);
    let more = vmm.region(BYTES, 1 << 20, 0);
    vmm.frontend.add_mem_region(&more).unwrap();
    vmm.ask(0);
    vmm.answer(0);
    vmm.frontend.remove_mem_region(&more).unwrap();
    vmm.ask(0);
    vmm.answer(0);
    assert!(vmm.frontend.remove_mem_region(&more).is_err());
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let served = Served::rng();
    let cases: [&[(u64, u64, u64)]; 4] = [
        &[(0, BYTES, 0), (BYTES / 2, BYTES, 0)],
        &[(0, BYTES + 4096, 0)],
        &[(0, BYTES, 4096)],
        &[(0, 4096, 100)],
    ];
    for regions in cases {
        let vmm = served.vmm();
        let regions: Vec<_> = regions
            .iter()
            .map(|(at, size, offset)| vmm.region(*at, *size, *offset))
            .collect();
        assert!(vmm.frontend.set_mem_table(&regions).is_err());
    }
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let served = Served::rng();
    let mut vmm = served.vmm();
    vmm.frontend.set_features(VERSION_1 | PROTOCOL).unwrap();
    let region = vmm.region(BYTES, BYTES, 0);
    vmm.frontend.set_mem_table(&[region]).unwrap();
    vmm.queues.push(VirtQueueDriver::new(&vmm.guest, 16));
    vmm.calls.push(EventFd::new(EFD_NONBLOCK).unwrap());
    vmm.describe_ring(0, 0);
    let error = EventFd::new(EFD_NONBLOCK).unwrap();
    vmm.frontend.set_vring_err(0, &error).unwrap();
    let kick = vmm.queues[0].notify();
    vmm.frontend.set_vring_kick(0, kick).unwrap();
    assert!(vmm.frontend.set_vring_enable(0, true).is_err());
    assert!(is_readable(&error, PATIENCE));
}

#[test]
fn what_was_not_offered_is_refused() {
    let served = Served::rng();
    assert!(served.vmm().frontend.set_features(1 << 5).is_err());
    assert!(served.vmm().frontend.set_vring_num(9, 16).is_err());
    assert!(served.vmm().frontend.set_vring_num(0, 3).is_err());
    assert!(served.vmm().frontend.set_vring_num(0, 2048).is_err());
    let (reader, _writer) = std::io::pipe().unwrap();
    // SAFETY: the fd is open, and the `EventFd` that borrows it is never dropped.
    let pipe = std::mem::ManuallyDrop::new(unsafe {
        <EventFd as std::os::fd::FromRawFd>::from_raw_fd(reader.as_raw_fd())
    });
    assert!(served.vmm().frontend.set_vring_kick(0, &pipe).is_err());
    // A driver of the first virtio is not served.
    let mut legacy = served.vmm();
    legacy.frontend.set_features(PROTOCOL).unwrap();
    let region = legacy.region(0, BYTES, 0);
    legacy.frontend.set_mem_table(&[region]).unwrap();
    legacy.queues.push(VirtQueueDriver::new(&legacy.guest, 16));
    legacy.calls.push(EventFd::new(EFD_NONBLOCK).unwrap());
    legacy.describe_ring(0, 0);
    let kick = legacy.queues[0].notify();
    legacy.frontend.set_vring_kick(0, kick).unwrap();
    assert!(legacy.frontend.set_vring_enable(0, true).is_err());
}

#[test]
fn half_a_message_holds_up_nothing() {
    let served = Served::rng();
    let mut stalled = served.stream();
    stalled.write_all(&[1, 0, 0, 0, 1]).unwrap();
    // Dropping the server does not wait for the rest.
    drop(served);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn garbage_ends_only_its_connection(
        messages in prop::collection::vec(
            (0_u32..48, any::<bool>(), prop::collection::vec(any::<u8>(), 0..64)),
            1..20,
        )
    ) {
        let served = Arc::new(Served::rng());
        let mut hostile = served.stream();
        for (request, sane, body) in messages {
            let mut message = Vec::new();
            message.extend(request.to_le_bytes());
            message.extend(if sane { 1_u32 } else { 0xffff }.to_le_bytes());
            message.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
            message.extend(body);
            if hostile.write_all(&message).is_err() {
                break;
            }
        }
        drop(hostile);
        let mut vmm = served.vmm();
        vmm.start(1);
        vmm.ask(0);
        prop_assert_eq!(vmm.answer(0).len, 64);
    }
}
