//! Every request type (5.2.6) on both engines.

use std::process::Command;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_SECURE_ERASE,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::virtio::block::{EngineChoice, MAX_DISCARD_SECTORS, MAX_EXTENTS};

#[test]
fn written_is_read_back() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        let data = pattern(1, 8192);
        assert_eq!(disk.write(3, &data), OK);
        assert_eq!(disk.content(3 * 512, 8192), data);
        assert_eq!(disk.flush(), OK);
        assert_eq!(disk.read(3, 8192), (OK, data));
        // The last sector, and one byte more than there is.
        assert_eq!(disk.write(2047, &[9; 512]), OK);
        assert_eq!(disk.read(2047, 512), (OK, vec![9; 512]));
        assert_eq!(disk.file().metadata().unwrap().len(), 1 << 20);
        let stats = disk.handle.stats();
        assert_eq!((stats.reads, stats.writes, stats.flushes), (2, 2, 1));
        assert_eq!((stats.read_bytes, stats.written_bytes), (8704, 8704));
    });
}

#[test]
fn the_engine_is_the_one_asked_for() {
    each_engine(|engine| {
        let disk = Disk::new(config(engine), 1 << 20);
        let uring = *disk.handle.engine() == EngineChoice::Uring;
        assert_eq!(uring, engine == Engine::Uring);
    });
}

#[test]
fn the_id_is_the_serial_padded() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        let addr = disk.driver.guest.alloc(21);
        let head = Buffer::Readable(header(VIRTIO_BLK_T_GET_ID, 0));
        let (status, used) = disk.send(vec![head.clone(), raw(addr, 20, WRITE)]);
        assert_eq!((status, used), (OK, 21));
        assert_eq!(
            disk.driver.guest.read(addr, 20),
            *b"a serial\0\0\0\0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(disk.send(vec![head, raw(addr, 19, WRITE)]).0, IOERR);
    });
}

#[test]
fn discarded_ranges_are_deallocated_and_neighbours_stay() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        assert_eq!(disk.write(0, &[7; 128 << 10]), OK);
        let extents = [(64, 64, 0), (160, 32, 0), (10, 0, 0)];
        let status = disk.extents(VIRTIO_BLK_T_DISCARD, &extents);
        if status == UNSUPP {
            println!("skipped: the file system of temporary files cannot punch holes");
            return;
        }
        assert_eq!(status, OK);
        let content = disk.content(0, 128 << 10);
        for (sector, bytes) in content.chunks(512).enumerate() {
            let gone = (64..128).contains(&sector) || (160..192).contains(&sector);
            assert_eq!(bytes, [if gone { 0 } else { 7 }; 512], "sector {sector}");
        }
    });
}

#[test]
fn zeroed_ranges_read_as_zeroes() {
    each_engine(|engine| {
        for flags in [0, 1] {
            let mut disk = Disk::new(config(engine), 1 << 20);
            assert_eq!(disk.write(0, &[7; 256 << 10]), OK);
            let extents = [(1, 3, flags), (100, 300, flags)];
            assert_eq!(disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &extents), OK);
            let content = disk.content(0, 256 << 10);
            for (sector, bytes) in content.chunks(512).enumerate() {
                let gone = (1..4).contains(&sector) || (100..400).contains(&sector);
                assert_eq!(bytes, [if gone { 0 } else { 7 }; 512], "sector {sector}");
            }
            assert_eq!(disk.file().metadata().unwrap().len(), 1 << 20);
        }
    });
}

#[test]
fn limits_of_ranges_5_2_6_2() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let last = (2040, 8, 0);
            assert_eq!(disk.extents(kind, &[last]), OK);
            assert_eq!(disk.extents(kind, &[(2041, 8, 0)]), IOERR);
            assert_eq!(disk.extents(kind, &[(u64::MAX, 8, 0)]), IOERR);
            assert_eq!(disk.extents(kind, &[(0, u32::MAX, 0)]), IOERR);
            assert_eq!(disk.extents(kind, &[last, (0, 1, 2)]), UNSUPP);
            assert_eq!(disk.extents(kind, &[]), IOERR);
            assert_eq!(disk.extents(kind, &[last; MAX_EXTENTS]), OK);
            assert_eq!(disk.extents(kind, &[last; MAX_EXTENTS + 1]), IOERR);
            let half = vec![
                Buffer::Readable(header(kind, 0)),
                Buffer::Readable(vec![0; 8]),
            ];
            assert_eq!(disk.send(half).0, IOERR);
        }
        // Unmap means nothing in a discard.
        assert_eq!(disk.extents(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPP);
        const { assert!(MAX_DISCARD_SECTORS < u32::MAX) };
        disk.check();
    });
}

#[test]
fn requests_of_other_features_are_unsupported() {
    each_engine(|engine| {
        let mut disk = Disk::inactive(config(engine), 1 << 20);
        let without = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        let features = disk.driver.device.features() & !without;
        disk.driver.activate_with(features).unwrap();
        assert_eq!(disk.extents(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), UNSUPP);
        assert_eq!(
            disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]),
            UNSUPP
        );
        for kind in [VIRTIO_BLK_T_SECURE_ERASE, 2, 3, 77, u32::MAX] {
            let head = Buffer::Readable(header(kind, 0));
            assert_eq!(disk.send(vec![head]), (UNSUPP, 1), "type {kind}");
        }
        disk.check();
    });
}

#[test]
fn a_read_only_device_writes_nothing() {
    each_engine(|engine| {
        let config = BlockConfig {
            read_only: true,
            ..config(engine)
        };
        let mut disk = Disk::new(config, 1 << 20);
        assert_eq!(disk.write(0, &[1; 512]), IOERR);
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(disk.extents(kind, &[(0, 8, 0)]), IOERR);
        }
        assert_eq!(disk.flush(), OK);
        assert_eq!(disk.read(0, 512), (OK, vec![0; 512]));
        assert_eq!(disk.handle.stats().errors, 3);
    });
}

#[test]
fn sectors_past_the_end_are_refused() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 64 << 10);
        for (sector, len) in [
            (128, 512),
            (127, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512 + 1, 512),
        ] {
            assert_eq!(disk.read(sector, len).0, IOERR, "sector {sector}");
            assert_eq!(
                disk.write(sector, &vec![1; len as usize]),
                IOERR,
                "sector {sector}"
            );
        }
        for len in [1, 511, 513] {
            assert_eq!(disk.read(0, len).0, IOERR, "{len} bytes");
            assert_eq!(disk.write(0, &vec![1; len as usize]), IOERR, "{len} bytes");
        }
        assert_eq!(disk.read(0, 0), (OK, vec![]));
        assert_eq!(disk.read(128, 0), (OK, vec![]));
        assert_eq!(disk.read(129, 0).0, IOERR);
        assert_eq!(disk.file().metadata().unwrap().len(), 64 << 10);
        assert_eq!(disk.content(0, 64 << 10), vec![0; 64 << 10]);
    });
}

#[test]
fn without_flush_writes_are_durable() {
    each_engine(|engine| {
        let mut disk = Disk::inactive(config(engine), 1 << 20);
        let features = disk.driver.device.features() & !(1 << VIRTIO_BLK_F_FLUSH);
        disk.driver.activate_with(features).unwrap();
        disk.check();
        assert_eq!(disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 1, 0)]), OK);
        assert_eq!(disk.read(1, 512), (OK, vec![0; 512]));
    });
}

#[test]
fn works_without_event_idx() {
    each_engine(|engine| {
        let mut disk = Disk::inactive(config(engine), 1 << 20);
        let features = disk.driver.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        disk.driver.activate_with(features).unwrap();
        for _ in 0..300 {
            disk.check();
        }
    });
}

#[test]
fn all_queues_serve() {
    each_engine(|engine| {
        let config = BlockConfig {
            queues: 4,
            ..config(engine)
        };
        let mut disk = Disk::new(config, 1 << 20);
        for queue in 0..4 {
            let addr = disk.driver.guest.alloc(512);
            let (status, _) = disk.status();
            disk.driver.queues[queue].add(&[
                Buffer::Readable(header(VIRTIO_BLK_T_IN, 5)),
                raw(addr, 512, WRITE),
                status,
            ]);
            disk.driver.queues[queue].kick();
        }
        for queue in 0..4 {
            assert_eq!(disk.driver.wait_used(queue).len, 513);
        }
    });
}

#[test]
fn many_requests_in_flight() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 4 << 20);
        for round in 0..20_u64 {
            let mut expected = Vec::new();
            // Three descriptors each, 128 in the queue.
            for index in 0..42_u64 {
                let sector = (round * 131 + index * 97) % 8000 / 8 * 8;
                let data = pattern(sector + round * 10_000, 512);
                let (status, addr) = disk.status();
                let head = disk.driver.queues[0].add(&[
                    Buffer::Readable(header(VIRTIO_BLK_T_OUT, sector)),
                    Buffer::Readable(data.clone()),
                    status,
                ]);
                expected.push((head, addr, sector, data));
            }
            disk.driver.queues[0].kick();
            for _ in 0..42 {
                let used = disk.driver.wait_used(0);
                let found = expected.iter().position(|(head, ..)| *head == used.head);
                let (_, addr, sector, data) = expected.swap_remove(found.unwrap());
                assert_eq!(disk.driver.guest.read(addr, 1), [OK]);
                assert_eq!(disk.content(sector * 512, 512), data);
            }
        }
    });
}

#[test]
fn a_block_device() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(4 << 20).unwrap();
    let losetup = |args: &[&str]| {
        let output = Command::new("losetup").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(device) = losetup(&["--show", "-f", image.path().to_str().unwrap()]) else {
        println!("skipped: cannot set up a loop device");
        return;
    };
    let result = std::panic::catch_unwind(|| {
        each_engine(|engine| {
            let (block, handle) = Block::new(config(engine)).unwrap();
            handle
                .attach(Backing::open(&device, BackingOptions::default()).unwrap())
                .unwrap();
            let mut driver = DeviceDriver::new(block);
            driver.activate().unwrap();
            let mut disk = Disk {
                driver,
                handle,
                file: tempfile::NamedTempFile::new().unwrap(),
            };
            assert_eq!(disk.capacity(), 8192);
            disk.check();
            assert_eq!(disk.write(0, &[7; 64 << 10]), OK);
            assert_eq!(disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 0)]), OK);
            assert_eq!(disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &[(24, 8, 1)]), OK);
            assert_eq!(disk.extents(VIRTIO_BLK_T_DISCARD, &[(40, 8, 0)]), OK);
            assert_eq!(disk.flush(), OK);
            let (status, data) = disk.read(0, 64 << 10);
            assert_eq!(status, OK);
            for (sector, bytes) in data.chunks(512).enumerate() {
                let gone = [8..16, 24..32, 40..48]
                    .iter()
                    .any(|range| range.contains(&sector));
                assert_eq!(bytes, [if gone { 0 } else { 7 }; 512], "sector {sector}");
            }
        });
    });
    losetup(&["-d", &device]).unwrap();
    result.unwrap();
}

#[test]
fn direct_io() {
    each_engine(|engine| {
        // Temporary files are often in memory, which has no direct I/O.
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = BackingOptions {
            direct: true,
            ..BackingOptions::default()
        };
        let Ok(backing) = Backing::open(file.path(), options) else {
            println!("skipped: no direct I/O here");
            return;
        };
        let config = BlockConfig {
            block_size: backing.alignment(),
            ..config(engine)
        };
        let (block, handle) = Block::new(config).unwrap();
        handle.attach(backing).unwrap();
        let mut driver = DeviceDriver::new(block);
        driver.activate().unwrap();
        let mut disk = Disk {
            driver,
            handle,
            file,
        };
        let data = pattern(7, 4096);
        let aligned = disk.driver.guest.alloc(8192).next_multiple_of(4096);
        disk.driver.guest.write(aligned, &data);
        let head = Buffer::Readable(header(VIRTIO_BLK_T_OUT, 8));
        assert_eq!(disk.send(vec![head, raw(aligned, 4096, 0)]).0, OK);
        assert_eq!(disk.content(4096, 4096), data);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// The disk holds what a plain array would.
    #[test]
    fn behaves_like_an_array(
        operations in proptest::collection::vec((0_u8..4, 0_u64..256, 1_u64..32, any::<u64>()), 1..40),
    ) {
        each_engine(|engine| {
            let mut disk = Disk::new(config(engine), 128 << 10);
            let mut model = vec![0; 128 << 10];
            for &(kind, sector, sectors, seed) in &operations {
                let sectors = sectors.min(256 - sector);
                let len = usize::try_from(sectors * 512).unwrap();
                let start = usize::try_from(sector * 512).unwrap();
                let range = start..start + len;
                match kind {
                    0 | 1 => {
                        let data = pattern(seed, len);
                        assert_eq!(disk.write(sector, &data), OK);
                        model[range].copy_from_slice(&data);
                    }
                    2 => {
                        let (status, data) = disk.read(sector, u32::try_from(len).unwrap());
                        assert_eq!(status, OK);
                        assert_eq!(data, model[range]);
                    }
                    _ => {
                        let extent = (sector, u32::try_from(sectors).unwrap(), u32::from(seed % 2 == 0));
                        assert_eq!(disk.extents(VIRTIO_BLK_T_WRITE_ZEROES, &[extent]), OK);
                        model[range].fill(0);
                    }
                }
            }
            assert_eq!(disk.content(0, model.len()), model);
        });
    }
}
