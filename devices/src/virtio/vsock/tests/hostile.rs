//! Guests that send anything at all.

use std::io::Read;
use std::time::Instant;

use proptest::collection::vec;
use proptest::prelude::*;

use super::guest::{Guest, RX, TX, blocking, next};
use crate::testing::{Buffer, RawDescriptor};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::packet::op;

/// Header fields near the edges, so that random packets get somewhere.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let port = prop_oneof![
        Just(1_u32),
        Just(2),
        Just(1 << 30),
        Just((1 << 30) + 1),
        any::<u32>()
    ];
    let count = prop_oneof![
        Just(0_u32),
        Just(1),
        Just(65_536),
        Just(u32::MAX),
        any::<u32>()
    ];
    (
        (port.clone(), port, prop_oneof![0..9_u16, any::<u16>()]),
        (
            prop_oneof![0..100_u32, any::<u32>()],
            count.clone(),
            count,
            any::<u32>(),
        ),
        prop_oneof![Just(1_u16), Just(1), Just(1), any::<u16>()],
        vec(any::<u8>(), 0..100),
    )
        .prop_map(
            |((src_port, dst_port, op), (len, buf_alloc, fwd_cnt, flags), kind, payload)| {
                let header = crate::virtio::vsock::packet::Header {
                    src_cid: 3,
                    dst_cid: 2,
                    src_port,
                    dst_port,
                    len,
                    kind,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                };
                let mut bytes = header.to_bytes().to_vec();
                bytes.extend(payload);
                bytes
            },
        )
}

fn buffer() -> impl Strategy<Value = Buffer> {
    prop_oneof![
        6 => packet().prop_map(Buffer::Readable),
        1 => vec(any::<u8>(), 0..200).prop_map(Buffer::Readable),
        1 => (0..200_u32).prop_map(Buffer::Writable),
        1 => (any::<u64>(), any::<u32>(), 0..8_u16).prop_map(|(addr, len, flags)| {
            // Not NEXT: the driver chains.
            Buffer::Raw(RawDescriptor { addr, len, flags: flags & !1, next: 0 })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn never_panics_and_goes_on_working(
        chains in vec(vec(buffer(), 1..4), 1..60),
        receive in vec(vec(buffer(), 1..3), 0..8),
        event_idx in any::<bool>(),
    ) {
        let mut guest = Guest::inactive(crate::virtio::vsock::VsockConfig::new(3));
        let mut features = guest.driver.device.features();
        if !event_idx {
            features &= !(1 << 29);
        }
        guest.driver.activate_with(features).unwrap();
        let mut listener = guest.handle.listen(1).unwrap();
        let _connecting = guest.handle.connect(2);
        for chain in &receive {
            guest.driver.queues[RX].add(chain);
        }
        guest.add_rx(100);
        for chain in &chains {
            guest.driver.queues[TX].add(chain);
            guest.driver.queues[TX].kick();
        }
        for _ in &chains {
            guest.driver.wait_used(TX);
        }
        // An honest guest is served as before.
        let request = guest.header(op::REQUEST, 9, 4_000_000);
        let mut honest = guest.handle.listen(9).unwrap();
        guest.send_header(&request, &[]);
        let stream = next(&mut honest).unwrap();
        guest.send_header(&{
            let mut header = guest.header(op::RW, 9, 4_000_000);
            header.len = 2;
            header
        }, b"ok");
        let mut got = [0; 2];
        blocking(stream).read_exact(&mut got).unwrap();
        prop_assert_eq!(&got, b"ok");
        prop_assert!(guest.driver.interrupt.needs_reset_reason().is_none());
        prop_assert!(guest.driver.runner.failures().is_empty());
        listener.close();
    }
}

#[test]
fn replies_are_bounded_when_the_guest_takes_none() {
    let mut guest = Guest::inactive(crate::virtio::vsock::VsockConfig::new(3));
    guest.driver.activate().unwrap();
    let packet = guest.header(op::RW, 5, 6).to_bytes().to_vec();
    // No receive buffers: after a bounded number of replies the device stops reading.
    let mut taken = 0;
    let mut queued = 0;
    let start = Instant::now();
    while start.elapsed() < super::guest::MOMENT * 10 {
        while queued - taken < 200 {
            guest.driver.queues[TX].add(&[Buffer::Readable(packet.clone())]);
            queued += 1;
        }
        guest.driver.queues[TX].kick();
        std::thread::sleep(super::guest::MOMENT);
        while guest.driver.queues[TX].pop_used().is_some() {
            taken += 1;
        }
    }
    assert_eq!(taken, 256);
    // It goes on when there is room for replies.
    for _ in 0..queued {
        if guest.driver.queues[RX].used_pending() == 0 {
            guest.add_rx(1);
        }
        guest.expect(op::RST);
    }
    for _ in taken..queued {
        guest.driver.wait_used(TX);
    }
}

#[test]
fn a_loop_of_descriptors_is_no_packet() {
    let mut guest = Guest::new();
    guest.driver.queues[TX].add_loop(8);
    guest.driver.queues[TX].kick();
    guest.driver.wait_used(TX);
    guest.accept(5);
}

#[test]
fn short_receive_buffers_are_returned_unused() {
    let mut guest = Guest::inactive(crate::virtio::vsock::VsockConfig::new(3));
    guest.driver.activate().unwrap();
    let _pending = guest.handle.connect(1);
    for len in [10, 43, 44] {
        guest.driver.queues[RX].add(&[Buffer::Writable(len)]);
    }
    guest.driver.queues[RX].kick();
    for _ in 0..3 {
        assert_eq!(guest.driver.wait_used(RX).len, 0);
    }
    guest.add_rx(1);
    guest.expect(op::REQUEST);
}
