//! However the driver cuts its chains, and whatever it puts in them.

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::*;
use crate::virtio::block::{MAX_SEGMENTS, QUEUE_SIZE};

/// 2.7.4.1: the framing of a request means nothing.
#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        let data = pattern(3, 1024);
        let mut bytes = header(VIRTIO_BLK_T_OUT, 2);
        bytes.extend(&data);
        for cuts in [&[1_usize, 2][..], &[15, 17], &[8, 16, 528], &[100], &[]] {
            let mut edges = vec![0];
            edges.extend(cuts);
            edges.push(bytes.len());
            let buffers = edges
                .windows(2)
                .map(|edge| Buffer::Readable(bytes[edge[0]..edge[1]].to_vec()))
                .collect();
            disk.file().write_all_at(&[0; 1024], 1024).unwrap();
            assert_eq!(disk.send(buffers), (OK, 1));
            assert_eq!(disk.content(1024, 1024), data);
        }
        // Data and status in one descriptor, and in uneven ones.
        let head = Buffer::Readable(header(VIRTIO_BLK_T_IN, 2));
        for lens in [&[1025_u32][..], &[1, 1024], &[1000, 20, 5]] {
            let mut buffers = vec![head.clone()];
            buffers.extend(lens.iter().map(|len| Buffer::Writable(*len)));
            let used = disk.driver.request(0, &buffers);
            assert_eq!(used.len, 1025);
            assert_eq!(used.data[..1024], data);
            assert_eq!(used.data[1024], OK);
        }
    });
}

#[test]
fn chains_without_a_status_byte_go_back_as_they_came() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        let head = || Buffer::Readable(header(VIRTIO_BLK_T_OUT, 0));
        let before = disk.content(0, 512);
        let outside = 1 << 40;
        let chains = [
            vec![head()],
            vec![head(), Buffer::Readable(vec![1; 512])],
            vec![
                head(),
                Buffer::Readable(vec![1; 512]),
                Buffer::Readable(vec![1]),
            ],
            vec![
                head(),
                Buffer::Readable(vec![1; 512]),
                raw(0x1000, 0, WRITE),
            ],
            vec![head(), raw(outside, 1, WRITE)],
            // 2.7.4.2: readable after writable.
            vec![Buffer::Writable(1), head()],
        ];
        for chain in chains {
            assert_eq!(disk.driver.request(0, &chain).len, 0, "{chain:?}");
        }
        assert_eq!(disk.content(0, 512), before);
        disk.check();
    });
}

#[test]
fn short_headers_and_buffers_outside_memory_are_errors() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        assert_eq!(disk.send(vec![]).0, IOERR);
        assert_eq!(disk.send(vec![Buffer::Readable(vec![0; 15])]).0, IOERR);
        assert_eq!(disk.send(vec![raw(u64::MAX - 8, 16, 0)]).0, IOERR);
        for addr in [(64 << 20) - 256, 1 << 40, u64::MAX - 511] {
            let write = Buffer::Readable(header(VIRTIO_BLK_T_OUT, 0));
            assert_eq!(disk.send(vec![write, raw(addr, 512, 0)]).0, IOERR);
            let read = Buffer::Readable(header(VIRTIO_BLK_T_IN, 0));
            assert_eq!(disk.send(vec![read, raw(addr, 512, WRITE)]).0, IOERR);
        }
        // More than any request may have, all of it in memory.
        let read = Buffer::Readable(header(VIRTIO_BLK_T_IN, 0));
        assert_eq!(disk.send(vec![read, raw(0, 48 << 20, WRITE)]).0, IOERR);
        assert_eq!(disk.content(0, 512), [0; 512]);
        disk.check();
    });
}

#[test]
fn loops_end_and_broken_rings_ask_for_a_reset() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        disk.driver.queues[0].add_loop(4);
        disk.driver.queues[0].kick();
        assert_eq!(disk.driver.wait_used(0).len, 0);
        disk.check();
        disk.driver.queues[0].publish(QUEUE_SIZE);
        disk.driver.queues[0].kick();
        assert!(disk.driver.wait_needs_reset().contains("block queue 0"));

        let mut disk = Disk::new(config(engine), 1 << 20);
        disk.driver.queues[0].set_avail_idx(QUEUE_SIZE + 1);
        disk.driver.queues[0].kick();
        assert!(disk.driver.wait_needs_reset().contains("invalid queue"));
        disk.driver.device.reset();
    });
}

/// As many segments as advertised, in an indirect table (2.7.5.3).
#[test]
fn the_largest_number_of_segments() {
    const INDIRECT: u16 = 4;
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 1 << 20);
        let send = |disk: &mut Disk, segments: u64| {
            let guest = disk.driver.guest.clone();
            let data = guest.place(&pattern(5, 512 * 256));
            let status = guest.place(&[UNANSWERED]);
            let head = guest.place(&header(VIRTIO_BLK_T_OUT, 0));
            let mut table = Vec::new();
            let mut put = |addr: u64, len: u32, flags: u16, next: u64| {
                table.extend(addr.to_le_bytes());
                table.extend(len.to_le_bytes());
                table.extend(flags.to_le_bytes());
                table.extend(u16::try_from(next).unwrap().to_le_bytes());
            };
            put(head, 16, 1, 1);
            for index in 0..segments {
                put(data + index * 512, 512, 1, index + 2);
            }
            put(status, 1, WRITE, 0);
            let len = u32::try_from(table.len()).unwrap();
            let used = disk
                .driver
                .request(0, &[raw(guest.place(&table), len, INDIRECT)]);
            (guest.read(status, 1)[0], used.len)
        };
        let most = u64::from(MAX_SEGMENTS);
        assert_eq!(send(&mut disk, most), (OK, 1));
        let len = 512 * MAX_SEGMENTS as usize;
        assert_eq!(disk.content(0, len), pattern(5, 512 * 256)[..len]);
        assert_eq!(send(&mut disk, most + 1), (UNANSWERED, 0));
        disk.check();
    });
}

fn hostile_descriptor() -> impl Strategy<Value = Buffer> {
    let addr = prop_oneof![
        0_u64..0x8000,
        Just((64 << 20) - 8),
        Just(u64::MAX - 4),
        any::<u64>(),
        0x10_0000_u64..0x20_0000,
    ];
    let len = prop_oneof![Just(0_u32), 1_u32..20, Just(512), Just(4096), any::<u32>()];
    let flags = prop_oneof![Just(0_u16), Just(WRITE), Just(4), any::<u16>()];
    (addr, len, flags).prop_map(|(addr, len, flags)| raw(addr, len, flags & !1))
}

fn hostile_chain() -> impl Strategy<Value = Vec<Buffer>> {
    let header = (0_u32..16, prop_oneof![0_u64..300, any::<u64>()]);
    let rest = proptest::collection::vec(hostile_descriptor(), 0..5);
    (any::<bool>(), header, rest, any::<bool>()).prop_map(
        |(headed, (kind, sector), rest, ended)| {
            let mut chain = Vec::new();
            if headed {
                chain.push(Buffer::Readable(super::header(kind, sector)));
            }
            chain.extend(rest);
            if ended || chain.is_empty() {
                chain.push(Buffer::Writable(1));
            }
            chain
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every chain is given back or a reset asked for; the device stays usable after one,
    /// and the disk keeps its size.
    #[test]
    fn hostile_chains(chains in proptest::collection::vec(hostile_chain(), 1..12)) {
        each_engine(|engine| {
            let mut disk = Disk::new(config(engine), 128 << 10);
            for chain in &chains {
                disk.driver.queues[0].add(chain);
            }
            disk.driver.queues[0].kick();
            let mut given_back = 0;
            let count = chains.len();
            let queue = &mut disk.driver.queues[0];
            // Hostile writes may hit the rings themselves: then nothing is promised but
            // that the host is unharmed.
            let end = std::time::Instant::now() + std::time::Duration::from_millis(200);
            while given_back < count && std::time::Instant::now() < end {
                if disk.driver.interrupt.needs_reset_reason().is_some() {
                    break;
                }
                while queue.used_pending() > 0 && queue.used_pending() <= QUEUE_SIZE && given_back < count {
                    let _ = queue.pop_used();
                    given_back += 1;
                }
                std::thread::yield_now();
            }
            disk.driver.device.reset();
            assert!(disk.driver.runner.failures().is_empty());
            assert_eq!(disk.file().metadata().unwrap().len(), 128 << 10);

            // A driver that starts over with rings of its own finds a working device.
            disk.start_over();
            disk.check();
        });
    }
}
