//! Save, resume and restore, with every device and its driver.

mod devices;

use std::time::Instant;

use virtio_queue::QueueT;

use super::*;
use crate::testing::Used;
use crate::transport::queue::QueueRegisters;
use crate::virtio::balloon::{Balloon, BalloonConfig};
use crate::virtio::block::{Backing, BackingOptions, Block, BlockConfig, Engine};
use crate::virtio::release::{PageRange, PageReleaser};
use crate::virtio::{StateError, state_tests};

/// A guest with one device on a transport, and its driver.
struct Vm {
    transport: MmioTransport,
    wire: Arc<Wire>,
    guest: TestGuest,
    queues: Vec<VirtQueueDriver>,
    runner: TestRunner,
}

#[derive(Debug)]
struct Release;

impl PageReleaser for Release {
    fn release(&self, _ranges: &[PageRange]) -> io::Result<()> {
        Ok(())
    }
}

impl Vm {
    /// The device with a driver that uses all its queues and features.
    fn start(device: Box<dyn VirtioDevice>) -> Self {
        let guest = TestGuest::new(16 << 20);
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .map(|size| VirtQueueDriver::new(&guest, *size))
            .collect();
        let features = device.features();
        let vm = Self::around(device, guest, queues);
        vm.write(reg::STATUS, 3);
        for half_of in [0, 1] {
            vm.write(reg::DRIVER_FEATURES_SEL, half_of);
            vm.write(reg::DRIVER_FEATURES, half(features, half_of));
        }
        vm.write(reg::STATUS, 0xb);
        for (index, queue) in (0..).zip(&vm.queues) {
            vm.write(reg::QUEUE_SEL, index);
            let (desc, driver, device) = queue.addresses();
            for (low, address) in [
                (reg::QUEUE_DESC_LOW, desc),
                (reg::QUEUE_DRIVER_LOW, driver),
                (reg::QUEUE_DEVICE_LOW, device),
            ] {
                vm.write(low, half(address, 0));
                vm.write(low + 4, half(address, 1));
            }
            vm.write(reg::QUEUE_READY, 1);
        }
        vm.write(reg::STATUS, 0xf);
        assert_eq!(vm.read(reg::STATUS), 0xf);
        vm
    }

    fn around(
        device: Box<dyn VirtioDevice>,
        guest: TestGuest,
        queues: Vec<VirtQueueDriver>,
    ) -> Self {
        let runner = TestRunner::start();
        let wire = Arc::new(Wire::default());
        let line = wire.clone();
        let transport = MmioTransport::new(device, guest.memory(), runner.runner(), line).unwrap();
        Self {
            transport,
            wire,
            guest,
            queues,
            runner,
        }
    }

    /// The same guest with a copy of its memory on a fresh device.
    fn clone_onto(mut self, device: Box<dyn VirtioDevice>, state: &MmioState) -> Self {
        let guest = self.guest.copy();
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            queue.move_to(&guest);
        }
        drop(self);
        let vm = Self::around(device, guest, queues);
        let begin = Instant::now();
        vm.transport.restore(state).unwrap();
        let name = vm.transport.device_type.name();
        println!("{name}: restored in {:?}", begin.elapsed());
        vm
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn kick(&self, queue: usize) {
        let index = u32::try_from(queue).unwrap();
        self.write(MmioTransport::QUEUE_NOTIFY, index);
    }

    fn wait(&mut self, queue: usize) -> Used {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.queues[queue].pop_used() {
                return used;
            }
            assert_eq!(self.read(reg::STATUS), 0xf);
            assert!(Instant::now() < end, "no answer on queue {queue}");
            std::thread::yield_now();
        }
    }

    /// No chain is waiting that was answered already.
    fn quiet(&self) {
        assert!(self.queues.iter().all(|queue| queue.used_pending() == 0));
        assert_eq!(self.runner.failures(), Vec::<String>::new());
    }
}

fn state_round_trip(state: &MmioState) -> MmioState {
    let bytes = postcard::to_stdvec(state).unwrap();
    let back = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(&back, state);
    back
}

/// Traffic before, across and after snapshots. `ask` makes the chain of a numbered request
/// available on a queue and returns that; `check` looks at its answer.
fn carries_on(
    fresh: impl Fn() -> Box<dyn VirtioDevice>,
    ask: impl Fn(&mut Vm, u8) -> usize,
    check: impl Fn(&Vm, u8, Used),
) {
    let mut vm = Vm::start(fresh());
    let mut number = 0;
    let mut exchange = |vm: &mut Vm| {
        for _ in 0..3 {
            number += 1;
            let queue = ask(vm, number);
            vm.kick(queue);
            let used = vm.wait(queue);
            check(vm, number, used);
        }
        vm.quiet();
    };
    exchange(&mut vm);
    // The same process goes on.
    for round in 0..3 {
        vm.transport.save().unwrap();
        let queue = ask(&mut vm, 100 + round);
        if round == 1 {
            vm.kick(queue);
        }
        std::thread::yield_now();
        assert_eq!(vm.queues[queue].used_pending(), 0, "it stands still");
        vm.transport.save().unwrap();
        vm.transport.resume().unwrap();
        vm.transport.resume().unwrap();
        let used = vm.wait(queue);
        check(&vm, 100 + round, used);
        exchange(&mut vm);
    }
    // Another one does.
    for round in 0..3 {
        let state = vm.transport.save().unwrap();
        let status = vm.read(reg::INTERRUPT_STATUS);
        let queue = ask(&mut vm, 200 + round);
        vm = vm.clone_onto(fresh(), &state_round_trip(&state));
        assert_eq!(vm.read(reg::STATUS), 0xf);
        assert_eq!(vm.read(reg::INTERRUPT_STATUS) & status, status);
        // A driver that polls faster than the device interrupts has nothing to be told again.
        assert!(status == 0 || vm.wire.0.load(Ordering::SeqCst) > 0);
        let used = vm.wait(queue);
        check(&vm, 200 + round, used);
        exchange(&mut vm);
        vm.transport.restore(&state).unwrap_err();
    }
    let state = vm.transport.save().unwrap();
    check_hostile(&fresh, &state);
    state_tests::check_hostile(&state.device, BoxedDevice::each(&fresh));
}

/// No change of a state makes a transport panic; some are refused for certain.
fn check_hostile(fresh: &impl Fn() -> Box<dyn VirtioDevice>, state: &MmioState) {
    let restore = |change: &dyn Fn(&mut MmioState)| {
        let mut state = state.clone();
        change(&mut state);
        let guest = TestGuest::new(16 << 20);
        Vm::around(fresh(), guest, Vec::new())
            .transport
            .restore(&state)
    };
    restore(&|_| {}).unwrap();
    let refused: [&dyn Fn(&mut MmioState); 11] = [
        &|state| state.device_type = 99,
        &|state| state.registers.queues.truncate(0),
        &|state| state.registers.queues.push(QueueRegisters::new(64)),
        &|state| state.registers.driver_features |= 1 << 63,
        &|state| state.registers.driver_features = 0,
        &|state| state.registers.status |= status::NEEDS_RESET,
        &|state| state.registers.status = status::DRIVER_OK,
        &|state| state.registers.status = status::FEATURES_OK,
        &|state| state.interrupt.status = 4,
        &|state| state.device.push(0),
        &|state| {
            for queue in &mut state.registers.queues {
                queue.desc = u64::MAX - 7;
            }
        },
    ];
    for (number, change) in refused.iter().enumerate() {
        let err = restore(change).unwrap_err();
        assert!(!err.to_string().is_empty(), "{number}");
    }
    // What waits for a reset is not activated, whatever its queues are.
    restore(&|state| {
        state.interrupt.needs_reset = true;
        for queue in &mut state.registers.queues {
            queue.set_size(0);
        }
    })
    .unwrap();
    let bytes = postcard::to_stdvec(state).unwrap();
    for len in 0..bytes.len() {
        postcard::from_bytes::<MmioState>(&bytes[..len]).unwrap_err();
    }
    for bit in (0..bytes.len() * 8).step_by(5) {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(flipped) = postcard::from_bytes::<MmioState>(&flipped) {
            let _ = restore(&|state| *state = flipped.clone());
        }
    }
}

/// A boxed device as a device.
#[derive(Debug)]
struct BoxedDevice(Box<dyn VirtioDevice>);

impl BoxedDevice {
    fn each(fresh: &impl Fn() -> Box<dyn VirtioDevice>) -> impl Fn() -> Self {
        move || Self(fresh())
    }
}

impl VirtioDevice for BoxedDevice {
    fn device_type(&self) -> DeviceType {
        self.0.device_type()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }
    fn features(&self) -> u64 {
        self.0.features()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), crate::virtio::ActivateError> {
        self.0.activate(activation)
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.0.restore(state)
    }
}

/// The statistics buffer that the balloon holds is there again.
#[test]
fn balloon_statistics() {
    let fresh = || Balloon::new(BalloonConfig::new(16 << 20), Arc::new(Release)).unwrap();
    let arrived = |handle: &crate::virtio::balloon::BalloonHandle, count| {
        let end = Instant::now() + PATIENCE;
        while handle.status().stats_count < count {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
    };
    let (device, handle) = fresh();
    let mut vm = Vm::start(Box::new(device));
    vm.queues[2].add(&[Buffer::Readable(vec![0; 10])]);
    vm.kick(2);
    arrived(&handle, 1);
    let state = vm.transport.save().unwrap();
    // Asked for while the device stands still.
    handle.request_stats().unwrap();
    vm.transport.resume().unwrap();
    vm.wait(2);
    vm.queues[2].add(&[Buffer::Readable(vec![0; 10])]);
    vm.kick(2);
    let again = vm.transport.save().unwrap();
    assert_eq!(again.device, state.device);
    let (device, handle) = fresh();
    let mut vm = vm.clone_onto(Box::new(device), &again);
    arrived(&handle, 1);
    handle.request_stats().unwrap();
    vm.wait(2);
}

/// A device that its driver has not started, or only half.
#[test]
fn any_phase_of_the_driver_is_kept() {
    let phases: [&dyn Fn(&Vm); 4] = [
        &|_| {},
        &|vm| vm.write(reg::STATUS, 1),
        &|vm| {
            vm.write(reg::STATUS, 3);
            // Not offered, and not yet refused.
            vm.write(reg::DRIVER_FEATURES, u32::MAX);
        },
        &|vm| {
            vm.write(reg::STATUS, 3);
            vm.write(reg::DRIVER_FEATURES_SEL, 1);
            vm.write(reg::DRIVER_FEATURES, 1);
            vm.write(reg::STATUS, 0xb);
            vm.write(reg::QUEUE_NUM, 7);
            vm.write(reg::QUEUE_DESC_HIGH, 7);
        },
    ];
    for phase in phases {
        let fresh = || Box::new(Rng::new().unwrap());
        let vm = Vm::around(fresh(), TestGuest::new(1 << 20), Vec::new());
        phase(&vm);
        let state = vm.transport.save().unwrap();
        vm.transport.resume().unwrap();
        let restored = vm.clone_onto(fresh(), &state);
        assert_eq!(restored.transport.save().unwrap(), state);
        // A driver can start over.
        restored.write(reg::STATUS, 0);
        assert_eq!(restored.read(reg::STATUS), 0);
    }
}

#[test]
fn what_needs_a_reset_still_does() {
    let mut vm = Vm::start(Box::new(Rng::new().unwrap()));
    vm.queues[0].set_avail_idx(1000);
    vm.kick(0);
    let end = Instant::now() + PATIENCE;
    while vm.read(reg::STATUS) & status::NEEDS_RESET == 0 {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
    let state = vm.transport.save().unwrap();
    vm.transport.resume().unwrap();
    let vm = vm.clone_onto(Box::new(Rng::new().unwrap()), &state);
    assert_eq!(vm.read(reg::STATUS), 0xf | status::NEEDS_RESET);
    assert_eq!(vm.read(reg::INTERRUPT_STATUS), reg::CONFIG_CHANGE);
    assert_eq!(vm.wire.0.load(Ordering::SeqCst), 1);
    vm.write(reg::STATUS, 0);
    assert_eq!(vm.read(reg::STATUS), 0);
}

/// A disk that is not there in the clone, and one that comes before the clone runs.
#[test]
fn a_changed_capacity_is_told() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let open = || Backing::open(file.path(), BackingOptions::default()).unwrap();
    let fresh = || Block::new(BlockConfig::default()).unwrap();
    for (before, after) in [(false, true), (true, false), (true, true), (false, false)] {
        let (device, handle) = fresh();
        if before {
            handle.attach(open()).unwrap();
        }
        let vm = Vm::start(Box::new(device));
        let state = vm.transport.save().unwrap();
        let (device, handle) = fresh();
        if after {
            handle.attach(open()).unwrap();
        }
        let vm = vm.clone_onto(Box::new(device), &state);
        let told = vm.read(reg::INTERRUPT_STATUS) == reg::CONFIG_CHANGE;
        assert_eq!(told, before != after);
        let generation = vm.read(reg::CONFIG_GENERATION);
        assert_eq!(generation, u32::from(told));
        if !after {
            handle.attach(open()).unwrap();
            assert_eq!(vm.read(reg::INTERRUPT_STATUS), reg::CONFIG_CHANGE);
        }
    }
}

/// A change while the device stands still, and yet another snapshot before it goes on.
#[test]
fn a_change_outlasts_another_snapshot() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let open = || Backing::open(file.path(), BackingOptions::default()).unwrap();
    let (device, handle) = Block::new(BlockConfig::default()).unwrap();
    let vm = Vm::start(Box::new(device));
    vm.transport.save().unwrap();
    handle.attach(open()).unwrap();
    assert_eq!(vm.read(reg::INTERRUPT_STATUS), 0);
    let state = vm.transport.save().unwrap();
    let (device, handle) = Block::new(BlockConfig::default()).unwrap();
    handle.attach(open()).unwrap();
    let vm = vm.clone_onto(Box::new(device), &state);
    assert_eq!(vm.read(reg::INTERRUPT_STATUS), reg::CONFIG_CHANGE);
}

/// Requests in flight when the snapshot is taken are finished, each once.
#[test]
fn requests_in_flight_are_finished() {
    for engine in [Engine::Sync, Engine::Auto] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let fresh = || {
            let (device, handle) = Block::new(BlockConfig {
                engine,
                ..BlockConfig::default()
            })
            .unwrap();
            let backing = Backing::open(file.path(), BackingOptions::default()).unwrap();
            handle.attach(backing).unwrap();
            Box::new(device)
        };
        let mut vm = Vm::start(fresh());
        for number in 1..=30_u8 {
            let mut header = 1_u64.to_le_bytes().to_vec();
            header.extend((u64::from(number) * 128).to_le_bytes());
            vm.queues[0].add(&[
                Buffer::Readable(header),
                Buffer::Readable(vec![number; 64 << 10]),
                Buffer::Writable(1),
            ]);
        }
        vm.kick(0);
        let state = vm.transport.save().unwrap();
        let done = vm.queues[0].used_pending();
        let queue = vm.queues[0].queue();
        let used = queue.used_idx(&*vm.guest.memory(), Ordering::SeqCst);
        assert_eq!(used.unwrap().0, done);
        let mut vm = vm.clone_onto(fresh(), &state);
        let mut heads: Vec<u16> = (0..30)
            .map(|_| {
                let used = vm.wait(0);
                assert_eq!(used.data, [0]);
                used.head
            })
            .collect();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), 30);
        vm.quiet();
        let bytes = std::fs::read(file.path()).unwrap();
        for number in 1..=30_u8 {
            let at = usize::from(number) << 16;
            assert_eq!(bytes[at..at + (64 << 10)], vec![number; 64 << 10]);
        }
    }
}
