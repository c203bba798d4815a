//! Frames both ways.

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::virtio::net::QUEUE_SIZE;
use crate::virtio::net::config::GUEST_OFFLOADS;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn frames_pass_both_ways() {
    in_namespace(|| {
        for without in [
            0,
            1 << VIRTIO_RING_F_EVENT_IDX,
            GUEST_OFFLOADS,
            MERGEABLE | GUEST_OFFLOADS,
        ] {
            let tap = tap("tap0", 1);
            let wire = Wire::new("tap0");
            let mut nic = Nic::new(NetConfig::new(MAC), without);
            nic.handle.attach(tap).unwrap();
            let mut bytes = 0;
            for round in 0..100 {
                let out = frame(MAC, BROADCAST, &payload(round, 46 + round * 14));
                nic.send(1, &out);
                assert_eq!(wire.receive(), out);
                let back = frame(HOST, MAC, &payload(round, 50 + round * 14));
                // Enough for the longest frame there can be, each time.
                if round % 20 == 0 {
                    nic.provide(0, 64, 2048);
                }
                wire.send(&back);
                assert_eq!(nic.receive(0), (back.clone(), 1));
                bytes += out.len();
            }
            let stats = nic.handle.stats();
            assert_eq!((stats.tx_frames, stats.rx_frames), (100, 100));
            assert_eq!(stats.tx_bytes, bytes as u64);
            assert_eq!((stats.tx_dropped, stats.rx_dropped), (0, 0));
        }
    });
}

/// Our own stack answers: ARP and ICMP through the kernel.
#[test]
fn the_host_answers_pings() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        ip("addr add 10.9.0.1/24 dev tap0");
        ip(&format!(
            "neigh add 10.9.0.2 lladdr {} dev tap0",
            "02:00:00:00:00:07"
        ));
        let host = std::fs::read_to_string("/proc/thread-self/net/arp").unwrap();
        assert!(host.contains("10.9.0.2"));
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap).unwrap();
        nic.provide(0, 100, 2048);
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
        arp.extend(MAC);
        arp.extend([10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
        let mut request = frame(MAC, BROADCAST, &arp);
        request[12..14].copy_from_slice(&[8, 6]);
        nic.send(1, &request);
        let host_mac: [u8; 6] = loop {
            let (reply, _) = nic.receive(0);
            if reply[12..14] == [8, 6] && reply[20..22] == [0, 2] {
                assert_eq!(reply[28..32], [10, 9, 0, 1]);
                break reply[6..12].try_into().unwrap();
            }
        };
        // An echo request whose ICMP checksum is left to the device (5.1.6.2).
        let mut packet = vec![
            0x45, 0, 0, 60, 0, 1, 0, 0, 64, 1, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1,
        ];
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend([8, 0, 0, 0, 0x12, 0x34, 0, 1]);
        packet.extend(payload(1, 32));
        let mut request = frame(MAC, host_mac, &packet);
        request[12..14].copy_from_slice(&[8, 0]);
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 34, 0, 2, 0, 0, 0];
        bytes.extend(&request);
        nic.driver.request(1, &[Buffer::Readable(bytes)]);
        let reply = loop {
            let (reply, _) = nic.receive(0);
            if reply[12..14] == [8, 0] && reply[23] == 1 {
                break reply;
            }
        };
        assert_eq!(reply[34], 0, "an echo reply");
        assert_eq!(reply[38..42], [0x12, 0x34, 0, 1]);
        assert_eq!(reply[42..74], payload(1, 32));
    });
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// 5.1.6.4: a frame spread over buffers, all of them visible at once.
#[test]
fn long_frames_are_merged_from_small_buffers() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        ip("link set tap0 mtu 9000");
        let wire = Wire::new("tap0");
        let config = NetConfig {
            mtu: Some(9000),
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config, GUEST_OFFLOADS);
        nic.handle.attach(tap).unwrap();
        nic.provide(0, 100, 512);
        let mut left = 100;
        for len in [60, 500, 501, 1012, 1013, 9014] {
            let sent = frame(HOST, MAC, &payload(len, len - 14));
            if left < 30 {
                nic.provide(0, 50, 512);
                left += 50;
            }
            wire.send(&sent);
            let (received, count) = nic.receive(0);
            assert_eq!(
                usize::from(count),
                (len + HEADER_BYTES).div_ceil(512),
                "{len} bytes"
            );
            assert_eq!(received, sent);
            left -= usize::from(count);
        }
        assert_eq!(nic.handle.stats().rx_dropped, 0);
    });
}

/// Without mergeable buffers a frame needs one buffer that holds all of it (5.1.6.3.1).
#[test]
fn frames_longer_than_their_buffer_are_dropped() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        let wire = Wire::new("tap0");
        let mut nic = Nic::new(NetConfig::new(MAC), MERGEABLE | GUEST_OFFLOADS);
        nic.handle.attach(tap).unwrap();
        // A big one made of several descriptors, then small ones.
        nic.driver.queues[0].add(&[
            Buffer::Writable(12),
            Buffer::Writable(100),
            Buffer::Writable(1500),
        ]);
        nic.provide(0, 2, 200);
        let long = frame(HOST, MAC, &payload(1, 1400));
        wire.send(&long);
        assert_eq!(nic.receive(0), (long.clone(), 1));
        wire.send(&long);
        nic.wait(|handle| handle.stats().rx_dropped == 1);
        let short = frame(HOST, MAC, &payload(2, 100));
        wire.send(&short);
        assert_eq!(nic.receive(0), (short, 1));
    });
}

/// Without buffers the tap is left alone until the driver has some.
#[test]
fn frames_wait_for_buffers() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        let wire = Wire::new("tap0");
        let mut nic = Nic::new(NetConfig::new(MAC), MERGEABLE);
        nic.handle.attach(tap).unwrap();
        let frames: Vec<_> = (0..20)
            .map(|seed| frame(HOST, MAC, &payload(seed, 100)))
            .collect();
        for sent in &frames {
            wire.send(sent);
        }
        for sent in frames {
            assert_eq!(nic.driver.queues[0].used_pending(), 0);
            nic.provide(0, 1, 2048);
            assert_eq!(nic.receive(0), (sent, 1));
        }
        assert_eq!(nic.handle.stats().rx_dropped, 0);
    });
}

/// More frames than one turn of the loop handles, more than the ring holds.
#[test]
fn bursts_arrive_complete_and_in_order() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        let wire = Wire::new("tap0");
        let mut nic = Nic::new(NetConfig::new(MAC), GUEST_OFFLOADS);
        nic.handle.attach(tap).unwrap();
        let size = usize::from(QUEUE_SIZE);
        nic.provide(0, size, 1600);
        for seed in 0..size - 1 {
            wire.send(&frame(HOST, MAC, &payload(seed, 200)));
        }
        for seed in 0..size - 1 {
            assert_eq!(nic.receive(0).0, frame(HOST, MAC, &payload(seed, 200)));
        }
        for seed in 0..size {
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend(frame(MAC, HOST, &payload(seed, 80)));
            nic.driver.queues[1].add(&[Buffer::Readable(bytes)]);
        }
        nic.driver.queues[1].kick();
        for seed in 0..size {
            assert_eq!(nic.driver.wait_used(1).len, 0);
            assert_eq!(wire.receive(), frame(MAC, HOST, &payload(seed, 80)));
        }
    });
}

/// A TCP segment of 20000 bytes over IPv4, to be cut into 1000, and its virtio header:
/// NEEDS_CSUM, GSO_TCPV4, hdr_len 54, gso_size 1000, csum_start 34, csum_offset 16.
fn large_segment(from: [u8; 6], to: [u8; 6]) -> ([u8; 10], Vec<u8>) {
    let mut packet = vec![0x45, 0];
    packet.extend(20_040_u16.to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0]);
    packet.extend([0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.extend(payload(3, 20_000));
    let mut segment = frame(from, to, &packet);
    segment[12..14].copy_from_slice(&[8, 0]);
    ([1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0], segment)
}

/// A driver that takes large segments gets them whole, others in pieces (5.1.3.1).
#[test]
fn large_segments_are_cut_only_if_they_have_to_be() {
    in_namespace(|| {
        let (header, segment) = large_segment(HOST, MAC);
        for (without, frames) in [
            (0, 1),
            (1 << VIRTIO_NET_F_GUEST_TSO4, 20),
            (GUEST_OFFLOADS, 20),
        ] {
            let mut nic = Nic::new(NetConfig::new(MAC), without);
            nic.handle.attach(tap("tap0", 1)).unwrap();
            let wire = Wire::of_type("tap0", 0x0800);
            nic.provide(0, 100, 2048);
            wire.send_unfinished(header, &segment);
            let mut data: Vec<u8> = Vec::new();
            for _ in 0..frames {
                data.extend(&nic.receive(0).0[54..]);
            }
            assert_eq!(data, segment[54..]);
            assert_eq!(nic.handle.stats().rx_frames, frames);
        }
    });
}

#[test]
fn large_segments_of_the_guest_are_taken() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::of_type("tap0", 0x0800);
        let (header, segment) = large_segment(MAC, BROADCAST);
        let mut bytes = header.to_vec();
        bytes.extend([0, 0]);
        bytes.extend(&segment);
        nic.driver.request(1, &[Buffer::Readable(bytes)]);
        let stats = nic.handle.stats();
        assert_eq!((stats.tx_frames, stats.tx_dropped), (1, 0));
        // Whole on the host as well: nothing cut it yet.
        assert_eq!(wire.receive()[54..], segment[54..]);
    });
}

#[test]
fn every_pair_passes_frames() {
    in_namespace(|| {
        let tap = tap("tap0", 4);
        let wire = Wire::new("tap0");
        let config = NetConfig {
            queue_pairs: 4,
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config, 0);
        nic.handle.attach(tap).unwrap();
        // MQ_VQ_PAIRS_SET to four.
        assert_eq!(nic.command(8, 4, 0, &4_u16.to_le_bytes()), 0);
        for pair in 0..4 {
            nic.provide(2 * pair, 64, 2048);
            let out = frame(MAC, BROADCAST, &payload(pair, 99));
            nic.send(2 * pair + 1, &out);
            assert_eq!(wire.receive(), out);
        }
        // The kernel spreads flows over the queues; whichever it takes.
        for seed in 0..32 {
            wire.send(&frame(HOST, MAC, &payload(seed, 77)));
        }
        nic.wait(|handle| handle.stats().rx_frames == 32);
        // Back to one: everything arrives there.
        assert_eq!(nic.command(8, 4, 0, &1_u16.to_le_bytes()), 0);
        while (0..4).any(|pair| nic.driver.queues[2 * pair].pop_used().is_some()) {}
        nic.provide(0, 64, 2048);
        for seed in 0..8 {
            let sent = frame(HOST, MAC, &payload(seed, 55));
            wire.send(&sent);
            assert_eq!(nic.receive(0).0, sent);
        }
        // Pairs that are not in use may still send.
        let out = frame(MAC, BROADCAST, &payload(9, 99));
        nic.send(7, &out);
        assert_eq!(wire.receive(), out);
    });
}
