use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::testing::{
    Buffer, DeviceDriver, PATIENCE, RawDescriptor, TestGuest, TestInterrupt, VirtQueueDriver,
};
use crate::virtio::{EventHandler, Interest, Loop, Ready, VirtioDevice};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

fn active() -> (DeviceDriver<Console>, ConsoleHandle, Log) {
    let log = Log::default();
    let (device, handle) = Console::new(Some(Box::new(log.clone()))).unwrap();
    let mut driver = DeviceDriver::new(device);
    driver.activate().unwrap();
    (driver, handle, log)
}

fn attached(handle: &ConsoleHandle) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    handle.attach(theirs).unwrap();
    ours
}

fn write(driver: &mut DeviceDriver<Console>, bytes: &[u8]) {
    driver.request(TRANSMIT, &[Buffer::Readable(bytes.to_vec())]);
}

fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Numbered so that a lost, doubled or moved piece shows.
fn numbered(len: usize) -> Vec<u8> {
    (0_u32..)
        .flat_map(|number| number.to_be_bytes())
        .take(len)
        .collect()
}

/// As much as a socket takes before it would block, and more.
const MUCH: usize = 2 << 20;

#[test]
fn output_goes_to_the_log_without_a_stream() {
    let (mut driver, _handle, log) = active();
    write(&mut driver, b"Linux ");
    driver.request(
        TRANSMIT,
        &[
            Buffer::Readable(b"ver".to_vec()),
            Buffer::Readable(b"sion\n".to_vec()),
        ],
    );
    assert_eq!(log.bytes(), b"Linux version\n");
    // More than one turn.
    let much = numbered(MUCH);
    write(&mut driver, &much);
    assert_eq!(log.bytes()[14..], much);
}

#[test]
fn both_ways_through_a_stream() {
    let (mut driver, handle, log) = active();
    let mut stream = attached(&handle);
    driver.queues[RECEIVE].add(&[Buffer::Writable(16)]);
    driver.queues[RECEIVE].kick();
    stream.write_all(b"ls\n").unwrap();
    let used = driver.wait_used(RECEIVE);
    assert_eq!(used.data, b"ls\n");
    write(&mut driver, b"bin etc\n");
    assert_eq!(read(&stream, 8), b"bin etc\n");
    assert_eq!(log.bytes(), b"bin etc\n");
}

#[test]
fn input_waits_for_buffers_of_the_guest() {
    let (mut driver, handle, _log) = active();
    let mut stream = attached(&handle);
    stream.write_all(&numbered(10_000)).unwrap();
    let mut got = Vec::new();
    while got.len() < 10_000 {
        let used = driver.request(RECEIVE, &[Buffer::Writable(1000), Buffer::Writable(5000)]);
        assert!((1..=MAX_INPUT_BYTES).contains(&used.data.len()));
        got.extend(used.data);
    }
    assert_eq!(got, numbered(10_000));
}

#[test]
fn output_waits_for_a_slow_reader_and_nothing_is_lost() {
    let (mut driver, handle, log) = active();
    let stream = attached(&handle);
    let much = numbered(MUCH);
    driver.queues[TRANSMIT].add(&[
        Buffer::Readable(much[..MUCH / 3].to_vec()),
        Buffer::Readable(much[MUCH / 3..].to_vec()),
    ]);
    driver.queues[TRANSMIT].kick();
    // Input still works while output waits.
    (&stream).write_all(b"x").unwrap();
    assert_eq!(driver.request(RECEIVE, &[Buffer::Writable(4)]).data, b"x");
    assert_eq!(driver.queues[TRANSMIT].used_pending(), 0);
    assert!(log.bytes().len() < MUCH);
    assert_eq!(read(&stream, MUCH), much);
    driver.wait_used(TRANSMIT);
    assert_eq!(log.bytes(), much);
}

#[test]
fn a_reader_that_goes_away_frees_the_guest() {
    let (mut driver, handle, log) = active();
    let stream = attached(&handle);
    let much = numbered(MUCH);
    driver.queues[TRANSMIT].add(&[Buffer::Readable(much.clone())]);
    driver.queues[TRANSMIT].kick();
    read(&stream, 100);
    drop(stream);
    driver.wait_used(TRANSMIT);
    assert_eq!(log.bytes(), much);
}

#[test]
fn detaching_frees_the_guest_too() {
    let (mut driver, handle, log) = active();
    let stream = attached(&handle);
    driver.queues[TRANSMIT].add(&[Buffer::Readable(numbered(MUCH))]);
    driver.queues[TRANSMIT].kick();
    read(&stream, 100);
    handle.detach().unwrap();
    driver.wait_used(TRANSMIT);
    assert_eq!(log.bytes(), numbered(MUCH));
    // What the socket had taken can still be read, then it ends.
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, numbered(MUCH)[100..100 + rest.len()]);
}

#[test]
fn a_second_stream_replaces_the_first() {
    let (mut driver, handle, _log) = active();
    let first = attached(&handle);
    let second = attached(&handle);
    write(&mut driver, b"hello");
    assert_eq!(read(&second, 5), b"hello");
    assert_eq!((&first).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_that_only_listens_keeps_listening() {
    let (mut driver, handle, _log) = active();
    driver.queues[RECEIVE].add(&[Buffer::Writable(16)]);
    driver.queues[RECEIVE].kick();
    let stream = attached(&handle);
    stream.shutdown(Shutdown::Write).unwrap();
    write(&mut driver, b"one");
    write(&mut driver, b"two");
    assert_eq!(read(&stream, 6), b"onetwo");
}

/// The loop, as far as a handler sees it.
#[derive(Default)]
struct Watches(HashMap<RawFd, (u64, Interest)>);

impl Loop for Watches {
    fn watch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        assert!(
            self.0.insert(fd, (token, interest)).is_none(),
            "watched already"
        );
        Ok(())
    }

    fn rewatch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.0.insert(fd, (token, interest)).expect("not watched");
        Ok(())
    }

    fn forget(&mut self, fd: RawFd) {
        self.0.remove(&fd);
    }
}

/// Otherwise a level-triggered loop would spin on a stream that has input the guest has no
/// buffer for, or that has hung up.
#[test]
fn a_stream_is_watched_only_for_what_is_wanted() {
    const WAKE: u64 = 2;
    const STREAM: u64 = 3;
    let guest = TestGuest::new(16 << 20);
    let mut receive = VirtQueueDriver::new(&guest, 16);
    let mut transmit = VirtQueueDriver::new(&guest, 16);
    let shared = Arc::new(handle::Shared::new(None).unwrap());
    let handle = ConsoleHandle {
        shared: Arc::clone(&shared),
    };
    let queues = [receive.activate(0), transmit.activate(1)];
    let interrupt = Arc::new(TestInterrupt::default());
    let mut handler = handler::Handler::new(shared, guest.memory(), interrupt, queues).unwrap();
    let mut watches = Watches::default();
    handler.start(&mut watches).unwrap();
    let mut wanted = |token| {
        handler.ready(&mut watches, token, Ready::default());
        let mut watched = watches.0.values();
        let stream = watched.find(|(token, _)| *token == STREAM);
        stream.map(|(_, interest)| (interest.readable, interest.writable))
    };
    let (readable, writable) = (Some((true, false)), Some((false, true)));

    let mut stream = attached(&handle);
    stream.write_all(b"x").unwrap();
    assert_eq!(wanted(WAKE), None, "no buffer of the guest");
    receive.add(&[Buffer::Writable(8)]);
    receive.add(&[Buffer::Writable(8)]);
    assert_eq!(wanted(RECEIVE as u64), readable, "one buffer left");
    stream.write_all(b"x").unwrap();
    assert_eq!(wanted(STREAM), None, "none left");
    transmit.add(&[Buffer::Readable(numbered(MUCH))]);
    let mut last = None;
    for _ in 0..2 * MUCH / MAX_TURN_BYTES {
        last = wanted(TRANSMIT as u64);
    }
    assert_eq!(last, writable, "the socket is full");
    handle.detach().unwrap();
    assert_eq!(wanted(WAKE), None, "no stream");

    let stream = attached(&handle);
    receive.add(&[Buffer::Writable(8)]);
    assert_eq!(wanted(WAKE), readable, "a buffer again");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(wanted(STREAM), None, "no more input will come");
}

#[test]
fn a_stream_attached_before_activation_waits() {
    let log = Log::default();
    let (device, handle) = Console::new(Some(Box::new(log))).unwrap();
    let stream = attached(&handle);
    let mut driver = DeviceDriver::new(device);
    driver.activate().unwrap();
    write(&mut driver, b"hi");
    assert_eq!(read(&stream, 2), b"hi");
    // And survives a reset of the device.
    driver.device.reset();
    driver.device.reset();
    driver.queues = vec![
        VirtQueueDriver::new(&driver.guest, 64),
        VirtQueueDriver::new(&driver.guest, 64),
    ];
    driver.activate().unwrap();
    write(&mut driver, b"ho");
    assert_eq!(read(&stream, 2), b"ho");
}

#[test]
fn the_size_is_in_config_space_and_changes_interrupt() {
    let (driver, handle, _log) = active();
    handle.resize(132, 50).unwrap();
    handle.resize(132, 50).unwrap();
    assert_eq!(driver.interrupt.config_count(), 1);
    let mut config = [0xff; 12];
    driver.device.read_config(0, &mut config);
    assert_eq!(config, [132, 0, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_buffer_without_room_is_given_back() {
    let (mut driver, handle, _log) = active();
    let mut stream = attached(&handle);
    stream.write_all(b"x").unwrap();
    assert_eq!(
        driver.request(RECEIVE, &[Buffer::Readable(vec![0; 8])]).len,
        0
    );
    assert_eq!(driver.request(RECEIVE, &[Buffer::Writable(8)]).data, b"x");
    assert_eq!(driver.request(TRANSMIT, &[Buffer::Writable(8)]).len, 0);
}

#[test]
fn broken_chains_ask_for_a_reset() {
    let outside = Buffer::Raw(RawDescriptor {
        addr: u64::MAX - 7,
        len: 4,
        flags: 0,
        next: 0,
    });
    let (mut driver, _handle, log) = active();
    driver.queues[TRANSMIT].add(&[outside]);
    driver.queues[TRANSMIT].kick();
    assert!(driver.wait_needs_reset().contains("outside guest memory"));
    assert!(log.bytes().is_empty());

    let (mut driver, _handle, _log) = active();
    driver.queues[TRANSMIT].add_loop(4);
    driver.queues[TRANSMIT].kick();
    assert!(driver.wait_needs_reset().contains("broken"));
    assert!(driver.runner.failures().is_empty());
}

#[test]
fn a_half_written_chain_goes_on_after_restore() {
    let (mut driver, handle, log) = active();
    let stream = attached(&handle);
    let much = numbered(MUCH);
    driver.queues[TRANSMIT].add(&[Buffer::Readable(much.clone())]);
    driver.queues[TRANSMIT].kick();
    read(&stream, 100);
    handle.resize(80, 25).unwrap();
    driver.device.quiesce();
    let state = driver.device.save().unwrap();
    let sent = log.bytes().len();
    assert!((100..MUCH).contains(&sent));
    let second_log = Log::default();
    let (mut device, second) = Console::new(Some(Box::new(second_log.clone()))).unwrap();
    device.restore(&state).unwrap();
    assert_eq!(device.save().unwrap(), state);
    let mut size = [0; 4];
    device.read_config(0, &mut size);
    assert_eq!(size, [80, 0, 25, 0]);
    // A terminal of another size is attached to the clone before it runs.
    second.resize(81, 25).unwrap();
    let config_count = driver.interrupt.config_count();
    driver.device = device;
    driver.activate().unwrap();
    driver.wait_used(TRANSMIT);
    assert_eq!(second_log.bytes(), much[sent..]);
    assert_eq!(driver.interrupt.config_count(), config_count + 1);
}

#[test]
fn a_half_written_chain_goes_on_after_a_pause() {
    let (mut driver, handle, log) = active();
    let stream = attached(&handle);
    let much = numbered(MUCH);
    driver.queues[TRANSMIT].add(&[Buffer::Readable(much.clone())]);
    driver.queues[TRANSMIT].kick();
    let mut seen = read(&stream, 100);
    for _ in 0..3 {
        driver.device.quiesce();
        driver.device.quiesce();
        driver.activate().unwrap();
        seen.extend(read(&stream, 100));
    }
    seen.extend(read(&stream, MUCH - seen.len()));
    assert_eq!(seen, much);
    driver.wait_used(TRANSMIT);
    assert_eq!(log.bytes(), much);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the guest queues, the device answers or asks for a reset, and no thread
    /// dies. A stream with endless input is attached.
    #[test]
    fn hostile_chains_are_answered_or_refused(
        queue in 0_usize..2,
        chain in proptest::collection::vec(hostile_buffer(), 1..6),
    ) {
        let (mut driver, handle, _log) = active();
        let mut stream = attached(&handle);
        stream.write_all(&[7; 8192]).unwrap();
        let reader = stream.try_clone().unwrap();
        let reader = std::thread::spawn(move || io::copy(&mut &reader, &mut io::sink()));
        driver.queues[queue].add(&chain);
        driver.queues[queue].kick();
        let pending = &driver.queues[queue];
        let done = driver.interrupt.wait_until(|interrupt| {
            pending.used_pending() > 0 || interrupt.needs_reset_reason().is_some()
        });
        prop_assert!(done);
        prop_assert_eq!(driver.runner.failures(), Vec::<String>::new());
        stream.shutdown(Shutdown::Both).unwrap();
        let _ = reader.join().unwrap();
    }
}

#[test]
fn hostile_states_are_refused() {
    let (device, handle) = Console::new(None).unwrap();
    handle.resize(300, 7).unwrap();
    let state = device.save().unwrap();
    crate::virtio::state_tests::check_hostile(&state, || Console::new(None).unwrap().0);
}

fn hostile_buffer() -> impl Strategy<Value = Buffer> {
    let address = prop_oneof![0_u64..128 << 20, any::<u64>()];
    let length = prop_oneof![0_u32..0x1_0000, any::<u32>()];
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
