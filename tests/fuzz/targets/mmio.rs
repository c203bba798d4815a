//! The virtio-mmio register file, and a device behind it.
#![no_main]

use std::sync::Arc;

use devices::bus::BusDevice;
use devices::testing::{Buffer, VirtQueueDriver};
use devices::transport::mmio::MmioTransport;
use devices::virtio::rng::Rng;
use fuzz::{InlineRunner, Result, TestGuest, Unstructured};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;

const QUEUE_SIZE: u16 = 64;
const STATUS: u64 = 0x70;
const MAX_ACTIONS: usize = 128;
const MAX_TURNS: usize = 1000;

struct Driver {
    transport: MmioTransport,
    guest: TestGuest,
}

impl Driver {
    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// What a good driver does, up to `steps` steps of it (virtio 1.2, 3.1.1).
    fn set_up(&self, steps: usize) -> VirtQueueDriver {
        let queue = VirtQueueDriver::new(&self.guest, QUEUE_SIZE);
        let (desc, avail, used) = queue.addresses();
        let half = |value: u64, shift: u64| u32::try_from(value >> shift & 0xffff_ffff).unwrap();
        let writes = [
            (STATUS, 0),
            (STATUS, 1),
            (STATUS, 3),
            (0x24, 1),
            (0x20, 1),
            (STATUS, 11),
            (0x30, 0),
            (0x38, u32::from(QUEUE_SIZE)),
            (0x80, half(desc, 0)),
            (0x84, half(desc, 32)),
            (0x90, half(avail, 0)),
            (0x94, half(avail, 32)),
            (0xa0, half(used, 0)),
            (0xa4, half(used, 32)),
            (0x44, 1),
            (STATUS, 15),
        ];
        for (offset, value) in writes.into_iter().take(steps) {
            self.write(offset, value);
        }
        queue
    }
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let guest = TestGuest::new(4 << 20);
    let runner = Arc::new(InlineRunner::default());
    let line = Arc::new(EventFd::new(0).unwrap());
    let device = Box::new(Rng::new().unwrap());
    let transport =
        MmioTransport::new(device, guest.memory(), Arc::clone(&runner) as _, line).unwrap();
    let driver = Driver { transport, guest };
    let mut queue = driver.set_up(input.int_in_range(0..=16)?);
    let mut free = QUEUE_SIZE;
    for _ in 0..MAX_ACTIONS {
        if input.is_empty() {
            break;
        }
        match input.int_in_range(0..=9)? {
            0..=3 => driver.write(register(input)?, value(input)?),
            4 => {
                // Of any width, anywhere.
                let len = *input.choose(&[1_usize, 2, 4, 8])?;
                let bytes = input.bytes(len)?;
                driver
                    .transport
                    .write(input.int_in_range(0..=0x1000)?, bytes);
            }
            5 => {
                let len = *input.choose(&[1_usize, 2, 4, 8])?;
                let data = &mut [0; 8][..len];
                driver.transport.read(input.int_in_range(0..=0x1000)?, data);
            }
            6 => {
                queue = driver.set_up(input.int_in_range(0..=16)?);
                free = QUEUE_SIZE;
            }
            7 => queue.set_avail_idx(input.arbitrary()?),
            _ if free > 0 => {
                free -= 1;
                queue.add(&[Buffer::Writable(input.int_in_range(0..=0x2000)?)]);
                driver.write(MmioTransport::QUEUE_NOTIFY, 0);
            }
            _ => {}
        }
        let turns = (0..MAX_TURNS).find(|_| !runner.turn(0));
        assert!(turns.is_some(), "the device never comes to rest");
    }
    driver.transport.reset();
    Ok(())
}

fn register(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(4 * input.int_in_range(0..=0x48)?)
}

fn value(input: &mut Unstructured<'_>) -> Result<u32> {
    if input.arbitrary()? {
        input.int_in_range(0..=16)
    } else {
        input.arbitrary()
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = play(&mut Unstructured::new(data));
});
