use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::request::tests::encode;
use super::*;
use crate::testing::{Buffer, DeviceDriver, RawDescriptor, VirtQueueDriver};
use crate::virtio::release::{HostPages, PageRange, PageReleaser};
use crate::virtio::{VirtioDevice, state_tests};

const BLOCK: u64 = 64 << 10;
const ADDRESS: u64 = 0x200_0000;
const REGION: u64 = 16 * BLOCK;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// Remembers what it was asked to release, or refuses.
#[derive(Debug, Default)]
struct Recorder {
    released: Mutex<Vec<(u64, u64)>>,
    refuse: AtomicBool,
}

impl PageReleaser for Recorder {
    fn release(&self, ranges: &[PageRange]) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("no"));
        }
        let ranges = ranges.iter().map(|range| (range.start(), range.bytes()));
        self.released.lock().unwrap().extend(ranges);
        Ok(())
    }
}

fn config() -> MemConfig {
    MemConfig {
        block_bytes: BLOCK,
        ..MemConfig::new(ADDRESS, REGION)
    }
}

struct Guest {
    driver: DeviceDriver<Mem>,
    handle: MemHandle,
    recorder: Arc<Recorder>,
}

impl Guest {
    fn new() -> Self {
        let recorder = Arc::new(Recorder::default());
        let (device, handle) = Mem::new(&config(), Arc::clone(&recorder) as _).unwrap();
        let mut driver = DeviceDriver::new(device);
        driver.activate().unwrap();
        Self {
            driver,
            handle,
            recorder,
        }
    }

    /// The type of the response and the state in it.
    fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> (u16, u16) {
        let request = encode(kind, ADDRESS + block * BLOCK, blocks);
        self.send(&[Buffer::Readable(request), Buffer::Writable(10)])
    }

    fn send(&mut self, buffers: &[Buffer]) -> (u16, u16) {
        let used = self.driver.request(0, buffers);
        assert_eq!(used.len, 10);
        let at = |offset| u16::from_le_bytes([used.data[offset], used.data[offset + 1]]);
        (at(0), at(8))
    }

    fn released(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.recorder.released.lock().unwrap())
    }
}

fn config_u64(device: &Mem, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(offset, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn memory_is_plugged_up_to_the_requested_size() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(PLUG, 0, 1), (NACK, 0));
    guest.handle.set_requested(4 * BLOCK).unwrap();
    assert_eq!(guest.driver.interrupt.config_count(), 1);
    assert_eq!(guest.ask(PLUG, 0, 5), (NACK, 0));
    assert_eq!(guest.ask(PLUG, 2, 3), (ACK, 0));
    assert_eq!(guest.ask(PLUG, 0, 2), (NACK, 0));
    assert_eq!(guest.ask(PLUG, 15, 1), (ACK, 0));
    assert_eq!(guest.handle.plugged(), 4 * BLOCK);
    assert_eq!(guest.released(), []);
    assert_eq!(guest.ask(STATE, 2, 3), (ACK, 0));
    assert_eq!(guest.ask(STATE, 5, 10), (ACK, 1));
    assert_eq!(guest.ask(STATE, 0, 16), (ACK, 2));
}

#[test]
fn unplugged_blocks_go_back_to_the_host() {
    let mut guest = Guest::new();
    guest.handle.set_requested(REGION).unwrap();
    guest.ask(PLUG, 0, 16);
    guest.handle.set_requested(13 * BLOCK).unwrap();
    assert_eq!(guest.ask(UNPLUG, 4, 3), (ACK, 0));
    assert_eq!(guest.released(), [(ADDRESS + 4 * BLOCK, 3 * BLOCK)]);
    assert_eq!(guest.handle.plugged(), 13 * BLOCK);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(guest.released(), [(ADDRESS, REGION)]);
    assert_eq!(guest.handle.plugged(), 0);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(guest.released(), []);
}

#[test]
fn host_memory_really_goes() {
    let mut guest = Guest::new();
    let memory = guest.driver.guest.memory();
    let (device, handle) = Mem::new(&config(), Arc::new(HostPages::new(memory))).unwrap();
    guest.driver.device = device;
    guest.driver.activate().unwrap();
    handle.set_requested(2 * BLOCK).unwrap();
    guest.ask(PLUG, 0, 2);
    guest
        .driver
        .guest
        .write(ADDRESS, &vec![3; 2 * usize::try_from(BLOCK).unwrap()]);
    guest.ask(UNPLUG, 0, 1);
    assert_eq!(guest.driver.guest.read(ADDRESS + BLOCK - 1, 2), [0, 3]);
}

#[test]
fn senseless_requests_are_errors() {
    let mut guest = Guest::new();
    guest.handle.set_requested(REGION).unwrap();
    guest.ask(PLUG, 0, 4);
    for (kind, block, blocks) in [
        (PLUG, 3, 2),  // one of them is plugged
        (PLUG, 4, 0),  // nothing
        (PLUG, 15, 2), // past the end
        (PLUG, 4, u16::MAX),
        (UNPLUG, 3, 2), // one of them is not plugged
        (UNPLUG, 16, 1),
        (STATE, 0, 17),
        (4, 0, 1), // no such request
    ] {
        assert_eq!(
            guest.ask(kind, block, blocks),
            (ERROR, 0),
            "{kind} {block} {blocks}"
        );
    }
    for address in [
        0,
        ADDRESS - BLOCK,
        ADDRESS + 1,
        ADDRESS + 4 * BLOCK + 4096,
        u64::MAX,
    ] {
        let request = encode(PLUG, address, 1);
        let response = guest.send(&[Buffer::Readable(request), Buffer::Writable(10)]);
        assert_eq!(response, (ERROR, 0), "{address:#x}");
    }
    assert_eq!(guest.handle.plugged(), 4 * BLOCK);
}

#[test]
fn a_host_that_keeps_the_pages_is_busy() {
    let mut guest = Guest::new();
    guest.handle.set_requested(REGION).unwrap();
    guest.ask(PLUG, 0, 4);
    guest.recorder.refuse.store(true, Ordering::SeqCst);
    assert_eq!(guest.ask(UNPLUG, 0, 4), (BUSY, 0));
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!(guest.handle.plugged(), 4 * BLOCK);
    guest.recorder.refuse.store(false, Ordering::SeqCst);
    assert_eq!(guest.ask(UNPLUG, 0, 4), (ACK, 0));
}

#[test]
fn requests_may_be_cut_anywhere() {
    let mut guest = Guest::new();
    guest.handle.set_requested(REGION).unwrap();
    let request = encode(PLUG, ADDRESS, 1);
    let response = guest.send(&[
        Buffer::Readable(request[..9].to_vec()),
        Buffer::Readable(request[9..].to_vec()),
        Buffer::Writable(3),
        Buffer::Writable(7),
    ]);
    assert_eq!(response, (ACK, 0));
}

#[test]
fn a_request_without_room_for_the_answer_is_not_done() {
    for buffers in [
        vec![Buffer::Readable(encode(PLUG, ADDRESS, 1))],
        vec![
            Buffer::Readable(encode(PLUG, ADDRESS, 1)),
            Buffer::Writable(9),
        ],
        vec![Buffer::Readable(vec![0; 23]), Buffer::Writable(10)],
    ] {
        let mut guest = Guest::new();
        guest.handle.set_requested(REGION).unwrap();
        guest.driver.queues[0].add(&buffers);
        guest.driver.queues[0].kick();
        guest.driver.wait_needs_reset();
        assert_eq!(guest.handle.plugged(), 0);
    }
}

#[test]
fn config_space_5_15_4() {
    let guest = Guest::new();
    guest.handle.set_requested(3 * BLOCK).unwrap();
    let device = &guest.driver.device;
    let fields: Vec<u64> = (0..7).map(|index| config_u64(device, index * 8)).collect();
    assert_eq!(fields, [BLOCK, 0, ADDRESS, REGION, REGION, 0, 3 * BLOCK]);
}

#[test]
fn impossible_regions_and_sizes_are_refused() {
    let new = |change: fn(&mut MemConfig)| {
        let mut config = config();
        change(&mut config);
        Mem::new(&config, Arc::new(Recorder::default()))
            .unwrap_err()
            .to_string()
    };
    assert!(new(|config| config.block_bytes = 3 << 20).contains("block_bytes"));
    assert!(new(|config| config.block_bytes = 1024).contains("4096"));
    assert!(new(|config| config.block_bytes = 0).contains("block_bytes"));
    assert!(new(|config| config.address += 4096).contains("address"));
    assert!(new(|config| config.region_bytes = 0).contains("region_bytes"));
    assert!(new(|config| config.region_bytes += 1).contains("region_bytes"));
    assert!(new(|config| config.region_bytes = !(BLOCK - 1)).contains("2^64"));
    assert!(new(|config| config.region_bytes = BLOCK << 21).contains("too many"));
    assert!(new(|config| config.requested_bytes = REGION + BLOCK).contains("more than"));
    assert!(new(|config| config.requested_bytes = 1).contains("multiple"));
    let guest = Guest::new();
    guest.handle.set_requested(REGION * 2).unwrap_err();
    guest.handle.set_requested(1).unwrap_err();
    assert_eq!(guest.handle.requested(), 0);
    assert_eq!(guest.driver.interrupt.config_count(), 0);
}

#[test]
fn plugged_memory_survives_a_driver_reset() {
    let mut guest = Guest::new();
    guest.handle.set_requested(REGION).unwrap();
    guest.ask(PLUG, 1, 1);
    guest.driver.device.reset();
    guest.driver.device.reset();
    guest.driver.queues = vec![VirtQueueDriver::new(&guest.driver.guest, 64)];
    guest.driver.activate().unwrap();
    assert_eq!(guest.ask(STATE, 1, 1), (ACK, 0));
}

#[test]
fn a_state_of_another_region_is_refused() {
    let new = || {
        Mem::new(&config(), Arc::new(Recorder::default()))
            .unwrap()
            .0
    };
    let restore = |state: (u64, u64, u64, u64, Vec<(u32, u32)>)| {
        let body = postcard::to_stdvec(&(state, false)).unwrap();
        new().restore(&state_tests::seal(1, &body))
    };
    let runs = |runs: &[(u32, u32)]| (ADDRESS, REGION, BLOCK, REGION, runs.to_vec());
    restore(runs(&[(1, 2), (3, 13)])).unwrap();
    restore((ADDRESS + BLOCK, REGION, BLOCK, 0, vec![])).unwrap_err();
    restore((ADDRESS, REGION, BLOCK * 2, 0, vec![])).unwrap_err();
    restore((ADDRESS, REGION * 2, BLOCK, 0, vec![])).unwrap_err();
    restore((ADDRESS, REGION, BLOCK, REGION * 2, vec![])).unwrap_err();
    restore((ADDRESS, REGION, BLOCK, 1, vec![])).unwrap_err();
    restore(runs(&[(15, 2)])).unwrap_err();
    restore(runs(&[(u32::MAX, u32::MAX)])).unwrap_err();
    restore(runs(&[(1, 2), (2, 1)])).unwrap_err();
    restore(runs(&[(1, 0)])).unwrap_err();
    let body = postcard::to_stdvec(&(runs(&[(1, 2), (8, 3)]), true)).unwrap();
    state_tests::check_hostile(&state_tests::seal(1, &body), new);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever requests arrive, what is plugged agrees with a model of 5.15.6, and a saved
    /// device is restored as it was.
    #[test]
    fn any_requests_leave_a_state_that_can_be_saved(
        requests in proptest::collection::vec((0_u16..5, 0_u64..20, 0_u16..6), 1..24),
        requested in 0_u64..=16,
    ) {
        let mut guest = Guest::new();
        guest.handle.set_requested(requested * BLOCK).unwrap();
        let mut model = [false; 16];
        for (kind, block, blocks) in requests {
            let (kind_of_response, _) = guest.ask(kind, block, blocks);
            let span = usize::try_from(block).unwrap()..usize::try_from(block).unwrap() + usize::from(blocks);
            if kind_of_response == ACK && kind == UNPLUG_ALL {
                model = [false; 16];
            } else if kind_of_response == ACK && (kind == PLUG || kind == UNPLUG) {
                let run = &mut model[span];
                prop_assert!(run.iter().all(|plugged| *plugged == (kind == UNPLUG)));
                run.fill(kind == PLUG);
            }
            let plugged = u64::try_from(model.iter().filter(|plugged| **plugged).count()).unwrap();
            prop_assert!(plugged <= requested);
            prop_assert_eq!(guest.handle.plugged(), plugged * BLOCK);
        }
        let state = guest.driver.device.save().unwrap();
        let (mut restored, handle) =
            Mem::new(&config(), Arc::new(Recorder::default())).unwrap();
        restored.restore(&state).unwrap();
        prop_assert_eq!(restored.save().unwrap(), state);
        prop_assert_eq!(handle.status(), guest.handle.status());
    }

    /// Chains that are no requests end in an answer or a reset, never in a dead thread.
    #[test]
    fn hostile_chains_are_answered_or_refused(
        chain in proptest::collection::vec(hostile_buffer(), 1..6),
    ) {
        let mut guest = Guest::new();
        guest.handle.set_requested(REGION).unwrap();
        guest.driver.queues[0].add(&chain);
        guest.driver.queues[0].kick();
        let queue = &guest.driver.queues[0];
        let done = guest.driver.interrupt.wait_until(|interrupt| {
            queue.used_pending() > 0 || interrupt.needs_reset_reason().is_some()
        });
        prop_assert!(done);
        prop_assert_eq!(guest.driver.runner.failures(), Vec::<String>::new());
    }
}

fn hostile_buffer() -> impl Strategy<Value = Buffer> {
    let request = (0_u16..6, any::<u64>(), any::<u16>())
        .prop_map(|(kind, address, blocks)| Buffer::Readable(encode(kind, address, blocks)));
    let raw = (any::<u64>(), any::<u32>(), any::<bool>()).prop_map(|(addr, len, write)| {
        Buffer::Raw(RawDescriptor {
            addr,
            len,
            flags: if write { 2 } else { 0 },
            next: 0,
        })
    });
    prop_oneof![
        request,
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Buffer::Readable),
        (0_u32..40).prop_map(Buffer::Writable),
        raw,
    ]
}
