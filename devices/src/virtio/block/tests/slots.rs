//! Attach, detach, resize, reset.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_OUT};

use super::*;
use crate::virtio::block::slot::Slot;
use crate::virtio::block::{AttachError, DetachError, EngineChoice};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn backings_come_and_go() {
    each_engine(|engine| {
        let (device, handle) = Block::new(config(engine)).unwrap();
        let mut driver = DeviceDriver::new(device);
        driver.activate().unwrap();
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut disk = Disk {
            driver,
            handle,
            file,
        };
        for round in 1..=50 {
            assert_eq!(disk.capacity(), 0);
            assert_eq!(disk.read(0, 512).0, IOERR);
            assert_eq!(disk.flush(), IOERR);
            let backing = open(&disk.file, false);
            disk.handle.attach(backing).unwrap();
            assert_eq!(disk.driver.interrupt.config_count(), round * 2 - 1);
            assert_eq!(disk.capacity(), 2048);
            assert!(disk.handle.is_attached());
            disk.check();
            let another = open(&disk.file, false);
            let err = disk.handle.attach(another).unwrap_err();
            assert!(matches!(err, AttachError::Occupied), "{err}");
            disk.handle.detach(SOON).unwrap();
            assert_eq!(disk.driver.interrupt.config_count(), round * 2);
        }
        let err = disk.handle.detach(SOON).unwrap_err();
        assert!(matches!(err, DetachError::Empty), "{err}");
        // The id is the slot's.
        let head = Buffer::Readable(header(VIRTIO_BLK_T_GET_ID, 0));
        assert_eq!(disk.send(vec![head, Buffer::Writable(20)]).0, OK);
    });
}

#[test]
fn detach_closes_the_file() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        disk.check();
        let path = disk.file.path().to_owned();
        let open_fds = || {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
                .filter(|target| *target == path)
                .count()
        };
        assert_eq!(open_fds(), 2);
        disk.handle.detach(SOON).unwrap();
        assert_eq!(open_fds(), 1);
    });
}

#[test]
fn detach_waits_for_what_is_in_flight() {
    let reason = "for the test".to_owned();
    let slot = Arc::new(Slot::new(512, false, EngineChoice::Sync { reason }));
    let handle = BlockHandle::new(Arc::clone(&slot));
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(512).unwrap();
    handle.attach(open(&file, false)).unwrap();
    let lease = slot.lease().unwrap();
    let err = handle.detach(Duration::from_millis(1)).unwrap_err();
    assert!(matches!(err, DetachError::InFlight(1)), "{err}");
    assert!(slot.lease().is_none());
    // Nothing new until the old one is done.
    let err = handle.attach(open(&file, false)).unwrap_err();
    assert!(matches!(err, AttachError::Occupied), "{err}");
    drop(lease);
    handle.attach(open(&file, false)).unwrap();
    let lease = slot.lease().unwrap();
    let waiting = std::thread::spawn(move || handle.detach(SOON));
    drop(lease);
    waiting.join().unwrap().unwrap();
}

#[test]
fn what_does_not_fit_the_slot_is_refused() {
    let mut disk = Disk::inactive(config(Engine::Sync), 4096);
    disk.handle.detach(SOON).unwrap();
    let err = disk.handle.attach(open(&disk.file, true)).unwrap_err();
    assert!(matches!(err, AttachError::ReadOnly(_)), "{err}");
    disk.driver.activate().unwrap();
    assert_eq!(disk.capacity(), 0);
}

#[test]
fn resize_shows_the_new_size() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 64 << 10);
        disk.file().set_len((128 << 10) + 100).unwrap();
        assert_eq!(disk.capacity(), 128);
        assert_eq!(disk.read(128, 512).0, IOERR);
        assert_eq!(disk.handle.resize().unwrap(), 128 << 10);
        assert_eq!(disk.driver.interrupt.config_count(), 1);
        assert_eq!(disk.capacity(), 256);
        assert_eq!(disk.write(255, &[1; 512]), OK);
        assert_eq!(disk.write(256, &[1; 512]), IOERR);
        // Smaller, too.
        disk.file().set_len(512).unwrap();
        assert_eq!(disk.handle.resize().unwrap(), 512);
        assert_eq!(disk.read(1, 512).0, IOERR);
        disk.handle.detach(SOON).unwrap();
        disk.handle.resize().unwrap_err();
    });
}

#[test]
fn reset_finishes_what_is_in_flight_and_touches_nothing_afterwards() {
    each_engine(|engine| {
        for _ in 0..10 {
            let mut disk = Disk::new(config(engine), 4 << 20);
            let mut statuses = Vec::new();
            for index in 0..40_u64 {
                let (status, addr) = disk.status();
                statuses.push(addr);
                disk.driver.queues[0].add(&[
                    Buffer::Readable(header(VIRTIO_BLK_T_OUT, index * 128)),
                    Buffer::Readable(pattern(index, 64 << 10)),
                    status,
                ]);
            }
            disk.driver.queues[0].kick();
            disk.driver.device.reset();
            let answered = |disk: &Disk| {
                let read = |addr: &u64| disk.driver.guest.read(*addr, 1)[0];
                statuses
                    .iter()
                    .map(read)
                    .filter(|status| *status == OK)
                    .count()
            };
            // Every request is either untouched or completely answered.
            let done = answered(&disk);
            assert_eq!(usize::from(disk.driver.queues[0].used_pending()), done);
            std::thread::yield_now();
            assert_eq!(answered(&disk), done);
            disk.driver.device.reset();
        }
    });
}

#[test]
fn activation_works_again_after_reset() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        disk.check();
        disk.driver.device.reset();
        disk.driver.device.reset();
        let handle = disk.handle.clone();
        // Attach and detach go on while nobody drives the device.
        handle.detach(SOON).unwrap();
        handle.attach(open(&disk.file, false)).unwrap();
        assert_eq!(disk.driver.interrupt.config_count(), 0);
        disk.start_over();
        disk.check();
    });
}

#[test]
fn nothing_is_activated_without_queues() {
    let (mut device, _handle) = Block::new(config(Engine::Auto)).unwrap();
    let driver = DeviceDriver::new(Block::new(config(Engine::Auto)).unwrap().0);
    device
        .activate(crate::virtio::Activation {
            memory: driver.guest.memory(),
            queues: Vec::new(),
            interrupt: Arc::clone(&driver.interrupt) as _,
            features: device.features(),
            runner: driver.runner.runner(),
        })
        .unwrap_err();
}
