mod snapshot;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, PATIENCE, TestGuest, TestRunner, VirtQueueDriver};
use crate::virtio::fs::{Fs, FsConfig};
use crate::virtio::rng::Rng;

#[derive(Debug, Default)]
struct Wire(AtomicU32);

impl IrqLine for Wire {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Fixture {
    // Before the runner: its drop resets the device, which the runner serves.
    transport: MmioTransport,
    wire: Arc<Wire>,
    guest: TestGuest,
    _runner: TestRunner,
}

impl Fixture {
    fn new() -> Self {
        let guest = TestGuest::new(1 << 20);
        let runner = TestRunner::start();
        let wire = Arc::new(Wire::default());
        let transport = MmioTransport::new(
            Box::new(Rng::new().unwrap()),
            guest.memory(),
            runner.runner(),
            wire.clone(),
        )
        .unwrap();
        Self {
            transport,
            wire,
            guest,
            _runner: runner,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self) {
        self.write(reg::STATUS, status::ACKNOWLEDGE);
        self.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, 1);
        self.write(reg::STATUS, self.read(reg::STATUS) | status::FEATURES_OK);
    }

    fn set_up_queue(&self, queue: &VirtQueueDriver) {
        let (desc, driver, device) = queue.addresses();
        self.write(reg::QUEUE_SEL, 0);
        self.write(reg::QUEUE_NUM, 64);
        for (low, address) in [
            (reg::QUEUE_DESC_LOW, desc),
            (reg::QUEUE_DRIVER_LOW, driver),
            (reg::QUEUE_DEVICE_LOW, device),
        ] {
            self.write(low, half(address, 0));
            self.write(low + 4, half(address, 1));
        }
        self.write(reg::QUEUE_READY, 1);
    }

    fn start(&self) {
        self.write(reg::STATUS, self.read(reg::STATUS) | status::DRIVER_OK);
    }
}

#[test]
fn a_slot_is_a_placeholder_until_a_device_is_plugged_in() {
    let slot = MmioSlot::new();
    let read = |offset| {
        let mut data = [0xff; 4];
        slot.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    let identity = || {
        let registers = [reg::MAGIC_VALUE, reg::VERSION, reg::DEVICE_ID, reg::STATUS];
        registers.map(read)
    };
    let empty = [reg::MAGIC, 2, 0, 0];
    assert_eq!(identity(), empty);
    slot.write(reg::STATUS, &1_u32.to_le_bytes());
    assert_eq!(identity(), empty);
    let Fixture {
        transport,
        wire: _wire,
        guest: _guest,
        _runner,
    } = Fixture::new();
    assert!(slot.plug(Arc::new(transport)).is_none());
    slot.write(reg::STATUS, &1_u32.to_le_bytes());
    assert_eq!(identity(), [reg::MAGIC, 2, 4, 1]);
    let transport = slot.unplug().unwrap();
    assert_eq!(identity(), empty);
    transport.reset();
    assert!(slot.plug(transport).is_none());
    assert_eq!(identity(), [reg::MAGIC, 2, 4, 0]);
}

#[test]
fn identifies_itself() {
    let fixture = Fixture::new();
    assert_eq!(fixture.read(reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(fixture.read(reg::VERSION), 2);
    assert_eq!(fixture.read(reg::DEVICE_ID), 4);
    assert_eq!(fixture.read(reg::QUEUE_NUM_MAX), 64);
    fixture.write(reg::QUEUE_SEL, 1);
    assert_eq!(fixture.read(reg::QUEUE_NUM_MAX), 0);
    fixture.write(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(fixture.read(reg::DEVICE_FEATURES) & 1, 1, "VERSION_1");
    assert_eq!(fixture.read(reg::SHM_LEN_LOW), u32::MAX);
}

#[test]
fn tells_where_memory_of_the_device_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = FsConfig::new("share", dir.path().to_owned());
    config.dax_bytes = 6 << 30;
    let device = Fs::new(config).unwrap();
    let memory = device.shared_memory().unwrap();
    let runner = TestRunner::start();
    let guest = TestGuest::new(1 << 20);
    let line = Arc::new(Wire::default());
    let transport =
        MmioTransport::new(Box::new(device), guest.memory(), runner.runner(), line).unwrap();
    let read = |offset| {
        let mut data = [0; 4];
        transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    let region = || {
        let registers = [
            reg::SHM_LEN_LOW,
            reg::SHM_LEN_HIGH,
            reg::SHM_BASE_LOW,
            reg::SHM_BASE_HIGH,
        ];
        registers.map(read)
    };
    // Nowhere, so far.
    assert_eq!(region(), [u32::MAX; 4]);
    memory.place(0x12_4000_0000).unwrap();
    assert_eq!(region(), [1 << 31, 1, 0x4000_0000, 0x12]);
    for other in [1, u32::MAX] {
        transport.write(reg::SHM_SEL, &other.to_le_bytes());
        assert_eq!(region(), [u32::MAX; 4]);
    }
    transport.reset();
    assert_eq!(region(), [1 << 31, 1, 0x4000_0000, 0x12]);
}

#[test]
fn a_driver_gets_its_requests_served_and_interrupts() {
    let fixture = Fixture::new();
    let mut queue = VirtQueueDriver::new(&fixture.guest, 64);
    fixture.negotiate();
    fixture.set_up_queue(&queue);
    assert_eq!(fixture.read(reg::QUEUE_READY), 1);
    fixture.start();
    assert_eq!(fixture.read(reg::STATUS), 0xf);

    queue.add(&[Buffer::Writable(16)]);
    fixture.write(MmioTransport::QUEUE_NOTIFY, 0);
    let end = std::time::Instant::now() + PATIENCE;
    while fixture.read(reg::INTERRUPT_STATUS) == 0 && std::time::Instant::now() < end {
        std::thread::yield_now();
    }
    assert_eq!(fixture.read(reg::INTERRUPT_STATUS), reg::USED_BUFFER);
    fixture.write(reg::INTERRUPT_ACK, reg::USED_BUFFER);
    assert_eq!(fixture.read(reg::INTERRUPT_STATUS), 0);
    assert_eq!(queue.pop_used().unwrap().len, 16);
    assert_eq!(fixture.wire.0.load(Ordering::SeqCst), 1);

    fixture.write(reg::STATUS, 0);
    assert_eq!(fixture.read(reg::STATUS), 0);
    assert_eq!(fixture.read(reg::QUEUE_READY), 0);
}

/// virtio 1.2, 3.1.1: what was not offered is not accepted.
#[test]
fn features_that_were_not_offered_are_refused() {
    let fixture = Fixture::new();
    fixture.write(reg::STATUS, 3);
    fixture.write(reg::DRIVER_FEATURES_SEL, 1);
    fixture.write(reg::DRIVER_FEATURES, 1 | 1 << 20);
    fixture.write(reg::STATUS, 3 | status::FEATURES_OK);
    assert_eq!(fixture.read(reg::STATUS), 3);
    // Without VERSION_1 this is a legacy driver.
    fixture.write(reg::DRIVER_FEATURES, 0);
    fixture.write(reg::STATUS, 3 | status::FEATURES_OK);
    assert_eq!(fixture.read(reg::STATUS), 3);
    fixture.write(reg::STATUS, 3 | status::DRIVER_OK);
    assert_eq!(fixture.read(reg::STATUS), 3, "DRIVER_OK needs FEATURES_OK");
}

#[test]
fn features_and_queues_are_settled_in_their_phases() {
    let fixture = Fixture::new();
    let queue = VirtQueueDriver::new(&fixture.guest, 64);
    fixture.set_up_queue(&queue);
    assert_eq!(fixture.read(reg::QUEUE_READY), 0, "before FEATURES_OK");
    fixture.negotiate();
    fixture.write(reg::DRIVER_FEATURES, 0);
    fixture.set_up_queue(&queue);
    fixture.start();
    fixture.write(reg::QUEUE_READY, 0);
    assert_eq!(fixture.read(reg::QUEUE_READY), 1, "after DRIVER_OK");
    // Status bits cannot be cleared one by one.
    fixture.write(reg::STATUS, 1);
    assert_eq!(fixture.read(reg::STATUS), 0xf);
}

#[test]
fn a_bad_queue_asks_for_a_reset_and_recovers_by_it() {
    for (register, value) in [
        (reg::QUEUE_NUM, 3),
        (reg::QUEUE_NUM, 128),
        (reg::QUEUE_NUM, 0x1_0000),
        (reg::QUEUE_DESC_LOW, 0x1001),
        (reg::QUEUE_DESC_HIGH, 1),
        (reg::QUEUE_DRIVER_HIGH, u32::MAX),
        (reg::QUEUE_DEVICE_LOW, 0xf_ffff),
    ] {
        let fixture = Fixture::new();
        let queue = VirtQueueDriver::new(&fixture.guest, 64);
        fixture.negotiate();
        fixture.set_up_queue(&queue);
        fixture.write(register, value);
        fixture.start();
        assert_eq!(
            fixture.read(reg::STATUS),
            0xf | status::NEEDS_RESET,
            "{register:#x} = {value:#x}"
        );
        assert_eq!(fixture.read(reg::INTERRUPT_STATUS), reg::CONFIG_CHANGE);
        fixture.write(reg::STATUS, 0);
        fixture.negotiate();
        fixture.set_up_queue(&queue);
        fixture.start();
        assert_eq!(fixture.read(reg::STATUS), 0xf);
    }
}

#[test]
fn a_device_without_its_queue_asks_for_a_reset() {
    let fixture = Fixture::new();
    fixture.negotiate();
    fixture.start();
    assert_ne!(fixture.read(reg::STATUS) & status::NEEDS_RESET, 0);
}

#[test]
fn registers_take_32_bit_accesses_only() {
    let fixture = Fixture::new();
    for len in [1, 2, 8] {
        let mut data = vec![0xff; len];
        fixture.transport.read(reg::MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0; len]);
        fixture.transport.write(reg::STATUS, &vec![1; len]);
    }
    fixture.transport.write(reg::STATUS + 1, &[1; 4]);
    assert_eq!(fixture.read(reg::STATUS), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// No sequence of accesses panics, and a reset always brings the device back.
    #[test]
    fn survives_any_accesses(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0_u64..0x110, any::<u64>()], 0_usize..9, any::<u64>()),
            0..200,
        ),
    ) {
        let fixture = Fixture::new();
        crate::testing::drive_registers(&fixture.transport, accesses);
        fixture.write(reg::STATUS, 0);
        let queue = VirtQueueDriver::new(&fixture.guest, 64);
        fixture.negotiate();
        fixture.set_up_queue(&queue);
        fixture.start();
        prop_assert_eq!(fixture.read(reg::STATUS), 0xf);
    }

    /// As above, but most accesses make sense.
    #[test]
    fn survives_accesses_that_nearly_make_sense(
        accesses in prop::collection::vec(
            (prop::bool::weighted(0.2), 0_u64..0x40, prop_oneof![0_u64..0x10, any::<u64>()]),
            0..200,
        ),
    ) {
        let fixture = Fixture::new();
        fixture.negotiate();
        let accesses = accesses.into_iter().map(|(read, word, value)| (read, word * 4, 4, value));
        crate::testing::drive_registers(&fixture.transport, accesses);
        fixture.write(reg::STATUS, 0);
        prop_assert_eq!(fixture.read(reg::STATUS), 0);
    }
}
