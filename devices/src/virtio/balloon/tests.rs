use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, DeviceDriver, RawDescriptor, VirtQueueDriver};
use crate::virtio::release::{HostPages, PAGE_BYTES, PageRange, PageReleaser};
use crate::virtio::{VirtioDevice, state_tests};

const MEMORY: u64 = 64 << 20;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

/// Remembers what it was asked to release.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<PageRange>>);

impl PageReleaser for Recorder {
    fn release(&self, ranges: &[PageRange]) -> io::Result<()> {
        self.0.lock().unwrap().extend(ranges);
        Ok(())
    }
}

impl Recorder {
    fn take(&self) -> Vec<(u64, u64)> {
        let ranges = std::mem::take(&mut *self.0.lock().unwrap());
        ranges.iter().map(|r| (r.start(), r.bytes())).collect()
    }
}

fn active() -> (DeviceDriver<Balloon>, BalloonHandle, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let (device, handle) =
        Balloon::new(BalloonConfig::new(MEMORY), Arc::clone(&recorder) as _).unwrap();
    let mut driver = DeviceDriver::new(device);
    driver.activate().unwrap();
    (driver, handle, recorder)
}

fn pfns(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn config_u32(device: &Balloon, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    device.read_config(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn inflating_releases_coalesced_pages() {
    let (mut driver, handle, recorder) = active();
    let used = driver.request(
        INFLATE,
        &[
            Buffer::Readable(pfns(&[0x203, 0x201, 0x300])),
            Buffer::Readable(pfns(&[0x202, 0x201])),
        ],
    );
    assert_eq!(used.len, 0);
    assert_eq!(recorder.take(), [(0x20_1000, 0x3000), (0x30_0000, 0x1000)]);
    assert_eq!(handle.status().released_bytes, 0x4000);
    driver.request(DEFLATE, &[Buffer::Readable(pfns(&[0x201]))]);
    assert_eq!(recorder.take(), []);
}

#[test]
fn inflating_really_gives_pages_back() {
    let (device, _handle) =
        Balloon::new(BalloonConfig::new(MEMORY), Arc::new(Recorder::default())).unwrap();
    let mut driver = DeviceDriver::new(device);
    // Its guest exists only now.
    let releaser = Arc::new(HostPages::new(driver.guest.memory()));
    let (device, _handle) = Balloon::new(BalloonConfig::new(MEMORY), releaser).unwrap();
    driver.device = device;
    driver.activate().unwrap();
    driver.guest.write(0x100_0000, &[5; 0x2000]);
    driver.request(INFLATE, &[Buffer::Readable(pfns(&[0x1000]))]);
    assert_eq!(driver.guest.read(0x100_0000, 1), [0]);
    assert_eq!(driver.guest.read(0x100_1000, 1), [5]);
}

#[test]
fn numbers_past_the_bound_are_ignored() {
    let (mut driver, _handle, recorder) = active();
    let numbers: Vec<u32> = (0..2000).map(|n| 0x1000 + n).collect();
    driver.request(INFLATE, &[Buffer::Readable(pfns(&numbers))]);
    assert_eq!(
        recorder.take(),
        [(0x100_0000, MAX_PFNS_PER_CHAIN as u64 * PAGE_BYTES)]
    );
}

#[test]
fn reported_pages_are_released_whole() {
    let (mut driver, _handle, recorder) = active();
    let page = |addr, len| {
        Buffer::Raw(RawDescriptor {
            addr,
            len,
            flags: 2,
            next: 0,
        })
    };
    driver.request(
        REPORTING,
        &[
            page(0x40_0000, 0x20_0000),
            page(0x60_0000, 0x20_0000),
            page(0x90_0800, 0x1800),
            page(0xa0_0800, 0x800),
        ],
    );
    assert_eq!(
        recorder.take(),
        [(0x40_0000, 0x40_0000), (0x90_1000, 0x1000)]
    );
    // Readable buffers report nothing.
    driver.request(REPORTING, &[Buffer::Readable(vec![0; 0x2000])]);
    assert_eq!(recorder.take(), []);
}

#[test]
fn pages_outside_memory_ask_for_a_reset_and_release_nothing() {
    for (queue, buffer) in [
        (INFLATE, Buffer::Readable(pfns(&[0x200, u32::MAX]))),
        (
            REPORTING,
            Buffer::Raw(RawDescriptor {
                addr: MEMORY - 0x1000,
                len: 0x2000,
                flags: 2,
                next: 0,
            }),
        ),
    ] {
        let (mut driver, _handle, recorder) = active();
        driver.queues[queue].add(&[buffer]);
        driver.queues[queue].kick();
        assert!(driver.wait_needs_reset().contains("not guest memory"));
        assert_eq!(recorder.take(), []);
        assert!(driver.runner.failures().is_empty());
    }
}

#[test]
fn a_new_target_interrupts_and_shows_in_config_space() {
    let (mut driver, handle, _recorder) = active();
    handle.set_target(8 << 20).unwrap();
    assert_eq!(config_u32(&driver.device, 0), 2048);
    assert_eq!(driver.interrupt.config_count(), 1);
    // The same again is no change.
    handle.set_target((8 << 20) + 1).unwrap();
    assert_eq!(driver.interrupt.config_count(), 1);
    assert_eq!(handle.target(), 8 << 20);
    let mut status = handle.subscribe();
    driver.device.write_config(4, &2048_u32.to_le_bytes());
    assert!(status.has_changed().unwrap());
    assert_eq!(status.borrow_and_update().actual_bytes, 8 << 20);
    assert_eq!(handle.actual(), 8 << 20);
    // Neither the target nor a piece of `actual` can be written.
    driver.device.write_config(0, &7_u32.to_le_bytes());
    driver.device.write_config(4, &[1, 2]);
    assert_eq!(config_u32(&driver.device, 0), 2048);
    assert_eq!(handle.actual(), 8 << 20);
}

#[test]
fn a_target_above_the_memory_is_refused_and_names_both() {
    let (_driver, handle, _recorder) = active();
    let err = handle.set_target(MEMORY + 1).unwrap_err().to_string();
    assert!(
        err.contains("67108865") && err.contains("67108864"),
        "{err}"
    );
    let config = BalloonConfig {
        target_bytes: MEMORY * 2,
        ..BalloonConfig::new(MEMORY)
    };
    Balloon::new(config, Arc::new(Recorder::default())).unwrap_err();
}

#[test]
fn a_target_set_before_activation_waits_for_the_driver() {
    let recorder = Arc::new(Recorder::default());
    let (device, handle) = Balloon::new(BalloonConfig::new(MEMORY), recorder).unwrap();
    handle.set_target(4 << 20).unwrap();
    assert_eq!(config_u32(&device, 0), 1024);
    assert!(matches!(handle.request_stats(), Err(BalloonError::NoStats)));
}

#[test]
fn statistics_arrive_once_per_request() {
    let (mut driver, handle, _recorder) = active();
    let mut status = handle.subscribe();
    let mut wait = |count| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            tokio::time::timeout(
                crate::testing::PATIENCE,
                status.wait_for(|status| status.stats_count == count),
            )
            .await
            .unwrap()
            .unwrap()
            .stats
        })
    };
    driver.queues[STATS].add(&[Buffer::Readable(stat(5, 1000))]);
    driver.queues[STATS].kick();
    assert_eq!(wait(1).total_bytes, Some(1000));
    // A kick without anything new is not a second answer.
    driver.queues[STATS].kick();
    assert_eq!(driver.queues[STATS].used_pending(), 0);
    for count in 2..5 {
        handle.request_stats().unwrap();
        driver.wait_used(STATS);
        driver.queues[STATS].add(&[Buffer::Readable(stat(4, count))]);
        driver.queues[STATS].kick();
        assert_eq!(wait(count).free_bytes, Some(count));
    }
}

#[test]
fn queues_follow_the_features_agreed_on() {
    // Linux: without statistics, the reporting queue is the third.
    let recorder = Arc::new(Recorder::default());
    let config = BalloonConfig {
        stats: false,
        ..BalloonConfig::new(MEMORY)
    };
    let (device, handle) = Balloon::new(config, Arc::clone(&recorder) as _).unwrap();
    let mut driver = DeviceDriver::new(device);
    driver.activate().unwrap();
    driver.request(
        2,
        &[Buffer::Raw(RawDescriptor {
            addr: 0x40_0000,
            len: 0x1000,
            flags: 2,
            next: 0,
        })],
    );
    assert_eq!(recorder.take(), [(0x40_0000, 0x1000)]);
    assert!(matches!(handle.request_stats(), Err(BalloonError::NoStats)));
}

#[test]
fn buffers_queued_before_activation_are_served() {
    let recorder = Arc::new(Recorder::default());
    let (device, _handle) =
        Balloon::new(BalloonConfig::new(MEMORY), Arc::clone(&recorder) as _).unwrap();
    let mut driver = DeviceDriver::new(device);
    driver.queues[INFLATE].add(&[Buffer::Readable(pfns(&[0x200]))]);
    driver.activate().unwrap();
    driver.wait_used(INFLATE);
    assert_eq!(recorder.take(), [(0x20_0000, 0x1000)]);
}

#[test]
fn reset_empties_the_balloon_and_activation_works_again() {
    let (mut driver, handle, recorder) = active();
    driver.device.write_config(4, &9_u32.to_le_bytes());
    driver.device.reset();
    driver.device.reset();
    assert_eq!(handle.actual(), 0);
    handle.set_target(1 << 20).unwrap();
    assert_eq!(driver.interrupt.config_count(), 0);
    driver.queues = (0..5)
        .map(|_| VirtQueueDriver::new(&driver.guest, 128))
        .collect();
    driver.activate().unwrap();
    driver.request(INFLATE, &[Buffer::Readable(pfns(&[0x200]))]);
    assert_eq!(recorder.take().len(), 1);
}

#[test]
fn the_host_refusing_does_not_fail_the_guest() {
    #[derive(Debug)]
    struct Refuses;
    impl PageReleaser for Refuses {
        fn release(&self, _: &[PageRange]) -> io::Result<()> {
            Err(io::Error::other("no"))
        }
    }
    let (device, handle) = Balloon::new(BalloonConfig::new(MEMORY), Arc::new(Refuses)).unwrap();
    let mut driver = DeviceDriver::new(device);
    driver.activate().unwrap();
    driver.request(INFLATE, &[Buffer::Readable(pfns(&[0x200]))]);
    assert_eq!(handle.status().released_bytes, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn saved_state_survives(target in 0..=MEMORY / PAGE_BYTES, actual in any::<u32>()) {
        let config = BalloonConfig::new(MEMORY);
        let recorder = || Arc::new(Recorder::default());
        let (mut device, handle) = Balloon::new(config, recorder()).unwrap();
        handle.set_target(target * PAGE_BYTES).unwrap();
        device.write_config(4, &actual.to_le_bytes());
        let state = device.save().unwrap();
        let (mut restored, handle) = Balloon::new(config, recorder()).unwrap();
        restored.restore(&state).unwrap();
        prop_assert_eq!(restored.save().unwrap(), state);
        prop_assert_eq!(handle.target(), target * PAGE_BYTES);
        prop_assert_eq!(handle.actual(), u64::from(actual) * PAGE_BYTES);
    }

    /// Whatever the guest queues, the device answers or asks for a reset, releases only
    /// guest memory, and no thread dies.
    #[test]
    fn hostile_chains_are_answered_or_refused(
        queue in 0_usize..4,
        chain in proptest::collection::vec(hostile_buffer(), 1..6),
    ) {
        let (mut driver, handle, recorder) = active();
        driver.queues[queue].add(&chain);
        driver.queues[queue].kick();
        // Statistics are given back on request only.
        handle.request_stats().unwrap();
        let (queue, interrupt) = (&driver.queues[queue], &driver.interrupt);
        let done = interrupt.wait_until(|interrupt| {
            queue.used_pending() > 0 || interrupt.needs_reset_reason().is_some()
        });
        prop_assert!(done);
        prop_assert_eq!(driver.runner.failures(), Vec::<String>::new());
        for (start, bytes) in recorder.take() {
            prop_assert!(start + bytes <= MEMORY);
        }
    }
}

#[test]
fn hostile_states_are_refused() {
    let new = || Balloon::new(BalloonConfig::new(MEMORY), Arc::new(Recorder::default())).unwrap();
    let (device, handle) = new();
    handle.set_target(300 * PAGE_BYTES).unwrap();
    state_tests::check_hostile(&device.save().unwrap(), || new().0);
    let pages = u32::try_from(MEMORY / PAGE_BYTES).unwrap() + 1;
    let body = postcard::to_stdvec(&(pages, 0_u32, false)).unwrap();
    let err = new().0.restore(&state_tests::seal(1, &body)).unwrap_err();
    assert!(
        err.to_string().contains("more than the guest's memory"),
        "{err}"
    );
}

fn hostile_buffer() -> impl Strategy<Value = Buffer> {
    let address = prop_oneof![0..2 * MEMORY, any::<u64>()];
    let length = prop_oneof![0_u32..64, 0_u32..0x40_0000, any::<u32>()];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64).prop_map(Buffer::Readable),
        (0_u32..0x1_0000).prop_map(Buffer::Writable),
        (address, length, any::<bool>()).prop_map(|(addr, len, write)| {
            Buffer::Raw(RawDescriptor {
                addr,
                len,
                flags: if write { 2 } else { 0 },
                next: 0,
            })
        }),
    ]
}
