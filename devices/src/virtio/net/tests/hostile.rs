//! Whatever the driver puts in its queues.

use proptest::prelude::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::*;
use crate::virtio::net::QUEUE_SIZE;

const WRITE: u16 = 2;

#[test]
fn bad_frames_are_given_back_and_counted() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        let chains = [
            // Too short for a header, for an Ethernet header; too long.
            vec![Buffer::Readable(vec![0; 11])],
            vec![Buffer::Readable(vec![0; 20])],
            vec![raw(0, 70_000, 0)],
            vec![raw(0, u32::MAX, 0)],
            // Outside memory, of the wrong direction.
            vec![Buffer::Readable(vec![0; 12]), raw(1 << 40, 100, 0)],
            vec![Buffer::Writable(100)],
            vec![Buffer::Readable(vec![0; 100]), Buffer::Writable(100)],
            // A checksum beyond the frame, an impossible segment type.
            vec![Buffer::Readable(
                [
                    vec![1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
                    vec![0; 60],
                ]
                .concat(),
            )],
            vec![Buffer::Readable(
                [
                    vec![0, 0x77, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0],
                    vec![0; 60],
                ]
                .concat(),
            )],
        ];
        let count = chains.len() as u64;
        for chain in chains {
            assert_eq!(nic.driver.request(1, &chain).len, 0, "{chain:?}");
        }
        assert_eq!(nic.handle.stats().tx_dropped, count);
        assert_eq!(nic.handle.stats().tx_frames, 0);
        // Header and frame may be cut anywhere (2.7.4.1).
        let out = frame(MAC, BROADCAST, &payload(1, 60));
        let bytes = [vec![0; HEADER_BYTES], out.clone()].concat();
        for cut in [1, 11, 12, 13, 30] {
            let (a, b) = bytes.split_at(cut);
            let chain = [Buffer::Readable(a.to_vec()), Buffer::Readable(b.to_vec())];
            nic.driver.request(1, &chain);
            assert_eq!(wire.receive(), out);
        }
    });
}

#[test]
fn bad_receive_buffers_are_given_back_empty() {
    in_namespace(|| {
        for without in [0, 1 << VIRTIO_NET_F_MRG_RXBUF] {
            let mut nic = Nic::new(NetConfig::new(MAC), without);
            nic.handle.attach(tap("tap0", 1)).unwrap();
            let wire = Wire::new("tap0");
            let chains = [
                vec![Buffer::Readable(vec![0; 2000])],
                vec![Buffer::Writable(11)],
                vec![raw(u64::MAX - 100, 2000, WRITE)],
                vec![raw((64 << 20) - 100, 2000, WRITE)],
                vec![Buffer::Readable(vec![0; 12]), Buffer::Writable(2000)],
            ];
            for chain in chains {
                // Looked at when there is something to receive, or to wait for.
                assert_eq!(nic.driver.request(0, &chain).len, 0, "{chain:?}");
            }
            nic.driver.queues[0].add_loop(4);
            nic.driver.queues[0].kick();
            assert_eq!(nic.driver.wait_used(0).len, 0);
            nic.provide(0, 64, 1600);
            let sent = frame(HOST, MAC, &payload(1, 100));
            wire.send(&sent);
            assert_eq!(nic.receive(0).0, sent);
        }
    });
}

#[test]
fn broken_rings_ask_for_a_reset() {
    for queue in [1, 2] {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.driver.queues[queue].set_avail_idx(QUEUE_SIZE + 1);
        nic.driver.queues[queue].kick();
        assert!(nic.driver.wait_needs_reset().contains("net: invalid queue"));
        nic.driver.device.reset();
    }
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        nic.driver.queues[0].set_avail_idx(QUEUE_SIZE + 1);
        nic.driver.queues[0].kick();
        assert!(nic.driver.wait_needs_reset().contains("net: invalid queue"));
        // The tap can still be taken away.
        nic.handle.detach(SOON).unwrap();
        wait_gone("tap0");
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
    let len = prop_oneof![Just(0_u32), 1_u32..20, Just(60), Just(4096), any::<u32>()];
    let flags = prop_oneof![Just(0_u16), Just(WRITE), Just(4), any::<u16>()];
    (addr, len, flags).prop_map(|(addr, len, flags)| raw(addr, len, flags & !1))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Random chains in every queue, with frames coming in: nothing panics, and a driver
    /// that starts over finds a working device.
    #[test]
    fn hostile_chains(
        chains in proptest::collection::vec(
            (0_usize..3, proptest::collection::vec(hostile_descriptor(), 1..5)),
            1..20,
        ),
        mergeable: bool,
    ) {
        in_namespace(move || {
            let without = if mergeable { 0 } else { 1 << VIRTIO_NET_F_MRG_RXBUF };
            let mut nic = Nic::new(NetConfig::new(MAC), without);
            nic.handle.attach(tap("tap0", 1)).unwrap();
            let wire = Wire::new("tap0");
            for (queue, chain) in &chains {
                nic.driver.queues[*queue].add(chain);
                nic.driver.queues[*queue].kick();
            }
            for seed in 0..4 {
                wire.send(&frame(HOST, MAC, &payload(seed, 400)));
            }
            // Returns when the device has looked at everything once.
            nic.handle.detach(SOON).unwrap();
            nic.driver.device.reset();
            assert!(nic.driver.runner.failures().is_empty());
            nic.handle.attach(tap("tap1", 1)).unwrap();
            let wire = Wire::new("tap1");
            let mut fresh = DeviceDriver::new(Net::new(NetConfig::new(MAC)).unwrap().0);
            std::mem::swap(&mut fresh.device, &mut nic.driver.device);
            fresh.activate().unwrap();
            nic.driver = fresh;
            let out = frame(MAC, BROADCAST, &payload(1, 61));
            nic.send(1, &out);
            while wire.receive() != out {}
            assert!(nic.driver.runner.failures().is_empty());
        });
    }
}
