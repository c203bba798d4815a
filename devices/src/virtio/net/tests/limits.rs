//! Rate limits, by counting.

use super::*;
use crate::virtio::net::{Rate, RateLimit};

const FRAMES: usize = 40;

fn limit(per_second: u64, burst: u64) -> RateLimit {
    RateLimit {
        bytes: None,
        frames: Some(Rate { per_second, burst }),
    }
}

/// A burst passes at once, the rest at the rate: never more than time has earned.
#[test]
fn frames_from_the_guest_are_held_back() {
    in_namespace(|| {
        let config = NetConfig {
            tx_limit: limit(100, 10),
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config, 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        let start = Instant::now();
        for seed in 0..FRAMES {
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend(frame(MAC, BROADCAST, &payload(seed, 60)));
            nic.driver.queues[1].add(&[Buffer::Readable(bytes)]);
        }
        nic.driver.queues[1].kick();
        for seed in 0..FRAMES {
            nic.driver.wait_used(1);
            let earned = 10 + start.elapsed().as_millis() / 10 + 1;
            assert!((seed as u128) < earned, "frame {seed} of {earned}");
            assert_eq!(wire.receive(), frame(MAC, BROADCAST, &payload(seed, 60)));
        }
        let stats = nic.handle.stats();
        assert!(stats.tx_limited > 0);
        assert_eq!((stats.tx_frames, stats.tx_dropped), (FRAMES as u64, 0));
    });
}

#[test]
fn frames_to_the_guest_are_held_back() {
    in_namespace(|| {
        let config = NetConfig {
            rx_limit: RateLimit {
                bytes: Some(Rate {
                    per_second: 20_000,
                    burst: 2_000,
                }),
                frames: None,
            },
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config, 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        nic.provide(0, 200, 1024);
        let start = Instant::now();
        for seed in 0..FRAMES {
            wire.send(&frame(HOST, MAC, &payload(seed, 186)));
        }
        for seed in 0..FRAMES {
            assert_eq!(nic.receive(0).0, frame(HOST, MAC, &payload(seed, 186)));
            let earned = 2_000 + start.elapsed().as_millis() * 20 + 200;
            assert!((seed as u128 + 1) * 200 <= earned + 200, "frame {seed}");
        }
        assert!(nic.handle.stats().rx_limited > 0);
    });
}

/// Detaching does not wait for the limit.
#[test]
fn a_limited_queue_lets_go_of_its_tap() {
    in_namespace(|| {
        let config = NetConfig {
            tx_limit: limit(1, 1),
            rx_limit: limit(1, 1),
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config, 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        for _ in 0..3 {
            nic.driver.queues[1].add(&[Buffer::Readable(vec![0; 80])]);
        }
        nic.driver.queues[1].kick();
        nic.wait(|handle| handle.stats().tx_limited > 0);
        nic.handle.detach(SOON).unwrap();
        nic.driver.device.reset();
    });
}
