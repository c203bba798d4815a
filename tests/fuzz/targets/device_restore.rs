//! Saved states of every device model and of the transport in front of it: damaged, and
//! valid but for what they say.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use devices::bus::BusDevice;
use devices::legacy::{ConsoleOptions, ConsoleOutput, SerialPort, SerialPortState};
use devices::testing::VirtQueueDriver;
use devices::transport::mmio::{MmioState, MmioTransport};
use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::block::{Block, BlockConfig};
use devices::virtio::console::Console;
use devices::virtio::fs::{DAX_BLOCK_BYTES, Fs, FsConfig};
use devices::virtio::mem::{Mem, MemConfig};
use devices::virtio::net::{Net, NetConfig};
use devices::virtio::release::HostPages;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Vsock, VsockConfig};
use devices::virtio::{DeviceType, VirtioDevice, seal_state};
use fuzz::{
    InlineRunner, Meter, Result, TestGuest, Unstructured, confined, fresh_dir, random_chain,
};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 16 << 20;
/// The last model; it is kept away from the host's files.
const FS: u8 = 7;
/// Version and check sum of a device's state.
const HEADER_BYTES: usize = 10;
const MAX_TURNS: usize = 1000;

/// As the transport's state is stored.
#[derive(Serialize)]
struct Stored {
    device_type: u32,
    registers: Registers,
    interrupt: Interrupt,
    device: Vec<u8>,
}

#[derive(Serialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    queues: Vec<Queue>,
}

#[derive(Serialize)]
struct Queue {
    max_size: u16,
    size: u32,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

#[derive(Serialize)]
struct Interrupt {
    status: u32,
    generation: u32,
    needs_reset: bool,
}

fn device(model: u8, guest: &TestGuest, share: &Path) -> Box<dyn VirtioDevice> {
    let pages = || Arc::new(HostPages::new(guest.memory()));
    match model {
        0 => {
            let config = NetConfig {
                queue_pairs: 2,
                ..NetConfig::new([2, 0, 0, 0, 0, 1])
            };
            Box::new(Net::new(config).unwrap().0)
        }
        1 => Box::new(Block::new(BlockConfig::default()).unwrap().0),
        2 => Box::new(Console::new(None).unwrap().0),
        3 => Box::new(Rng::new().unwrap()),
        4 => Box::new(
            Balloon::new(BalloonConfig::new(MEMORY as u64), pages())
                .unwrap()
                .0,
        ),
        5 => Box::new(Vsock::new(VsockConfig::new(3)).unwrap().0),
        6 => {
            let config = MemConfig {
                address: 12 << 20,
                region_bytes: 4 << 20,
                block_bytes: 64 << 10,
                requested_bytes: 0,
            };
            Box::new(Mem::new(&config, pages()).unwrap().0)
        }
        _ => {
            let config = FsConfig {
                workers: 1,
                max_inodes: 64,
                max_handles: 64,
                dax_bytes: 4 * DAX_BLOCK_BYTES,
                ..FsConfig::new("share", share.to_owned())
            };
            Box::new(Fs::new(config).unwrap())
        }
    }
}

/// The share's files; a state may name them.
fn fill(share: &Path) {
    std::fs::write(share.join("file"), "content").unwrap();
    std::fs::create_dir(share.join("folder")).unwrap();
    std::os::unix::fs::symlink("../canary/file", share.join("link")).unwrap();
}

/// The state of a device that has been used, where a fresh one says little.
fn in_use(device: &dyn VirtioDevice) -> Option<Vec<u8>> {
    const FILE: u32 = 0o100_000;
    const FOLDER: u32 = 0o040_000;
    let body = match device.device_type() {
        DeviceType::Mem => {
            let plugged: &[(u32, u32)] = &[(0, 4), (6, 1), (63, 1)];
            let sizes = (12_u64 << 20, 4_u64 << 20, 64_u64 << 10, 1_u64 << 20);
            postcard::to_stdvec(&(sizes, plugged, false))
        }
        DeviceType::Fs => {
            let file = |path: &'static str, kind| Some((path.as_bytes(), kind));
            let inodes = [
                (2_u64, 1_u64, file("file", FILE)),
                (3, 2, file("folder", FOLDER)),
                (5, 1, None),
            ];
            let handles = [(1_u64, 2_u64, 2_u32), (2, 3, 0)];
            let mappings = [(0_u64, (2_u64, 0_u64, true)), (3, (5, 1 << 21, false))];
            let session = (
                false,
                9_u64,
                4_u64,
                &inodes[..],
                &handles[..],
                &mappings[..],
            );
            postcard::to_stdvec(&("share", false, 4 * DAX_BLOCK_BYTES, Some(session)))
        }
        _ => return None,
    };
    Some(body.unwrap())
}

/// A device's state: what one saved with some bytes changed, or anything at all.
fn state(saved: &[u8], input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let known = saved
        .first_chunk()
        .map_or(1, |bytes| u16::from_le_bytes(*bytes));
    let version = or_any(known, input)?;
    // An input that has ended says zero: that is to be what is valid, here and below.
    Ok(match input.int_in_range(0..=7)? {
        0 => saved.to_vec(),
        3 => {
            let len = input.arbitrary_len::<u8>()?;
            input.bytes(len)?.to_vec()
        }
        1 | 2 => {
            let len = input.arbitrary_len::<u8>()?;
            seal_state(version, input.bytes(len)?)
        }
        _ => {
            let Some(body) = saved.get(HEADER_BYTES..) else {
                return Ok(saved.to_vec());
            };
            let mut body = body.to_vec();
            for _ in 0..input.int_in_range(1..=4)? {
                let from = input.int_in_range(0..=body.len())?;
                let removed = input.int_in_range(0..=8_usize)?.min(body.len() - from);
                let added = input.int_in_range(0..=16_usize)?.min(input.len());
                let added = input.bytes(added)?.to_vec();
                body.splice(from..from + removed, added);
            }
            seal_state(version, &body)
        }
    })
}

/// The truth, mostly.
fn or_any<'a, T: arbitrary::Arbitrary<'a>>(truth: T, input: &mut Unstructured<'a>) -> Result<T> {
    if input.ratio(15, 16)? {
        Ok(truth)
    } else {
        input.arbitrary()
    }
}

fn stored(
    device: &dyn VirtioDevice,
    queues: &[VirtQueueDriver],
    input: &mut Unstructured<'_>,
) -> Result<Stored> {
    let version = if device.device_type() == DeviceType::Fs {
        2
    } else {
        1
    };
    let used = in_use(device).map(|body| seal_state(version, &body));
    let saved = used.unwrap_or_else(|| device.save().unwrap());
    let state = state(&saved, input)?;
    let mut registers = Registers {
        // What drivers write on their way, and with it what they do not.
        status: *input.choose(&[15, 15, 15, 15, 11, 3, 1, 0])?,
        device_features_sel: input.int_in_range(0..=2)?,
        driver_features_sel: input.int_in_range(0..=2)?,
        driver_features: device.features(),
        queue_sel: input.int_in_range(0..=4)?,
        shm_sel: input.int_in_range(0..=1)?,
        queues: Vec::new(),
    };
    registers.status = or_any(registers.status, input)?;
    if !input.ratio(3, 4)? {
        registers.driver_features &= input.arbitrary::<u64>()? | 1 << 32;
    }
    registers.driver_features = or_any(registers.driver_features, input)?;
    for (size, queue) in device.queue_sizes().iter().zip(queues) {
        let (desc, driver, device) = queue.addresses();
        registers.queues.push(Queue {
            max_size: or_any(*size, input)?,
            size: or_any(u32::from(*size), input)?,
            ready: or_any(true, input)?,
            desc: or_any(desc, input)?,
            driver: or_any(driver, input)?,
            device: or_any(device, input)?,
        });
    }
    Ok(Stored {
        device_type: or_any(device.device_type() as u32, input)?,
        registers,
        interrupt: Interrupt {
            status: or_any(0, input)?,
            generation: input.arbitrary()?,
            needs_reset: !input.ratio(7, 8)?,
        },
        device: state,
    })
}

struct Machine {
    transport: MmioTransport,
    runner: Arc<InlineRunner>,
}

impl Machine {
    fn new(model: u8, guest: &TestGuest, share: &Path) -> Self {
        let runner = Arc::new(InlineRunner::default());
        let transport = MmioTransport::new(
            device(model, guest, share),
            guest.memory(),
            Arc::clone(&runner) as _,
            Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        )
        .unwrap();
        Self { transport, runner }
    }

    fn rest(&self) {
        let turns = (0..MAX_TURNS).find(|_| !self.runner.turn(0));
        assert!(turns.is_some(), "the device never comes to rest");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.transport.reset();
    }
}

fn restore_device(model: u8, share: &Path, input: &mut Unstructured<'_>) -> Result<()> {
    let guest = TestGuest::new(MEMORY);
    let fresh = device(model, &guest, share);
    let mut queues: Vec<_> = fresh
        .queue_sizes()
        .iter()
        .map(|size| VirtQueueDriver::new(&guest, *size))
        .collect();
    let stored = postcard::to_stdvec(&stored(&*fresh, &queues, input)?).unwrap();
    drop(fresh);
    let saved: MmioState = postcard::from_bytes(&stored).unwrap();
    assert_eq!(postcard::to_stdvec(&saved).unwrap(), stored);
    let machine = Machine::new(model, &guest, share);
    if Meter::check(stored.len(), || machine.transport.restore(&saved)).is_err() {
        return Ok(());
    }
    machine.rest();
    play(&machine, &mut queues, input);
    // What was taken once can be given on, whatever the guest has done.
    let saved = machine.transport.save().unwrap();
    drop(machine);
    let machine = Machine::new(model, &guest, share);
    machine.transport.restore(&saved).unwrap();
    machine.rest();
    Ok(())
}

/// A few requests and registers; the input may end.
fn play(
    machine: &Machine,
    queues: &mut [VirtQueueDriver],
    input: &mut Unstructured<'_>,
) -> Option<()> {
    for _ in 0..input.int_in_range(0..=4).ok()? {
        let index = input.choose_index(queues.len()).ok()?;
        let chain = random_chain(input).ok()?;
        queues.get_mut(index)?.add(&chain);
        let register = MmioTransport::QUEUE_NOTIFY;
        let index = u32::try_from(index).ok()?;
        machine.transport.write(register, &index.to_le_bytes());
        machine.rest();
        let mut data = [0; 4];
        let offset = 4 * input.int_in_range(0..=0x48).ok()?;
        machine.transport.read(offset, &mut data);
    }
    Some(())
}

fn restore_serial(input: &mut Unstructured<'_>) -> Result<()> {
    let bytes = input.bytes(input.len())?;
    let state = Meter::check(bytes.len(), || {
        postcard::from_bytes::<SerialPortState>(bytes)
    });
    let Ok(state) = state else {
        return Ok(());
    };
    let new = || {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        SerialPort::new(irq, ConsoleOutput::new(ConsoleOptions::default()).unwrap())
    };
    let port = new();
    if port.restore(&state).is_ok() {
        for offset in 0..SerialPort::PORTS {
            port.read(offset, &mut [0]);
        }
        new().restore(&port.save()).unwrap();
    }
    Ok(())
}

fn restore_anything(input: &mut Unstructured<'_>) -> Result<()> {
    let bytes = input.bytes(input.len())?;
    let _ = Meter::check(bytes.len(), || postcard::from_bytes::<MmioState>(bytes));
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let _ = match input.int_in_range(0..=15) {
        Ok(0) => restore_serial(&mut input),
        Ok(1) => restore_anything(&mut input),
        Ok(_) => match input.int_in_range(0..=FS) {
            Ok(FS) => {
                confined("share", |root| {
                    let share = fresh_dir(root, "share");
                    fill(&share);
                    let _ = restore_device(FS, &share, &mut input);
                });
                Ok(())
            }
            Ok(model) => restore_device(model, Path::new(""), &mut input),
            Err(err) => Err(err),
        },
        Err(_) => Ok(()),
    };
});
