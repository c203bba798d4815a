//! Guests that send anything at all.

use std::fs;

use proptest::collection::vec;
use proptest::prelude::*;

use super::client::{Client, REQUEST, ROOT, fields, op, u32_at};
use crate::testing::{Buffer, RawDescriptor};
use crate::virtio::fs::FsConfig;

fn errno_of(data: &[u8]) -> i32 {
    -u32_at(data, 4).cast_signed()
}

#[test]
fn unknown_operations_are_not_implemented() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    for opcode in [7, 51, 1000, u32::MAX, op::SETUPMAPPING, op::REMOVEMAPPING] {
        let reply = client.call(opcode, ROOT, fields().u64(0).u64(0), 64);
        assert_eq!(reply, Err(libc::ENOSYS), "opcode {opcode}");
    }
    let ioctl = fields().u64(0).u32(0).u32(0).u64(0).u32(0).u32(u32::MAX);
    assert_eq!(client.call(op::IOCTL, ROOT, ioctl, 64), Err(libc::ENOTTY));
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    let whole = client.request(op::LOOKUP, ROOT, b"name\0");
    // No header: nothing can be answered but an error without a name.
    for len in [1, 39] {
        let used = client.send(&[
            Buffer::Readable(whole[..len].to_vec()),
            Buffer::Writable(64),
        ]);
        assert_eq!(errno_of(&used.data), libc::EINVAL);
    }
    // A header that promises more or less than there is.
    for claimed in [0_u32, 39, 40, 44, 46, 4096, u32::MAX] {
        let mut request = whole.clone();
        request[..4].copy_from_slice(&claimed.to_le_bytes());
        let used = client.send(&[Buffer::Readable(request), Buffer::Writable(256)]);
        assert_eq!(client.reply(&used), Err(libc::EINVAL), "claimed {claimed}");
    }
    // A name without its end.
    let request = client.request(op::LOOKUP, ROOT, b"name");
    let used = client.send(&[Buffer::Readable(request), Buffer::Writable(256)]);
    assert_eq!(client.reply(&used), Err(libc::EINVAL));
    // Bodies cut short, for every operation.
    for opcode in 0..60 {
        for len in [0, 3] {
            let request = client.request(opcode, ROOT, &vec![0; len]);
            client.send(&[Buffer::Readable(request), Buffer::Writable(256)]);
        }
    }
    client.init();
    assert_eq!(client.lookup(ROOT, "name"), Err(libc::ENOENT));
}

#[test]
fn chains_that_are_no_request_are_returned() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    let request = client.request(op::GETATTR, ROOT, &[0; 16]);
    let outside = |addr, len, flags| {
        Buffer::Raw(RawDescriptor {
            addr,
            len,
            flags,
            next: 0,
        })
    };
    let readable = || Buffer::Readable(request.clone());
    // No room for a reply, or for all of it.
    assert_eq!(client.send(&[readable()]).len, 0);
    assert_eq!(client.send(&[readable(), Buffer::Writable(15)]).len, 0);
    let used = client.send(&[readable(), Buffer::Writable(20)]);
    assert_eq!(errno_of(&used.data), libc::EIO);
    // Only room, in the wrong order, outside memory, too large.
    let used = client.send(&[Buffer::Writable(64)]);
    assert_eq!(errno_of(&used.data), libc::EINVAL);
    let used = client.send(&[Buffer::Writable(64), readable()]);
    assert_eq!(errno_of(&used.data), libc::EINVAL);
    let used = client.send(&[Buffer::Writable(64), outside(u64::MAX - 3, 64, 2)]);
    assert_eq!(errno_of(&used.data), libc::EFAULT);
    for bad in [
        outside(0xffff_ffff_0000, 64, 0),
        outside(63 << 20, 2 << 20, 0),
        outside(0x1000, u32::MAX, 0),
    ] {
        let used = client.send(&[bad, Buffer::Writable(64)]);
        // The room behind it was not looked at.
        assert_eq!(used.len, 0);
    }
    client.driver.queues[REQUEST].add_loop(5);
    client.driver.queues[REQUEST].kick();
    client.driver.wait_used(REQUEST);
    client.getattr(ROOT).unwrap();
    assert!(client.driver.runner.failures().is_empty());
}

#[test]
fn a_reply_may_be_scattered() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "0123456789").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    let body = fields().u64(fh).u64(0).u32(10).u32(0).u64(0).u32(0).u32(0);
    let request = client.request(op::READ, node, &body.0);
    let (head, tail) = request.split_at(33);
    let used = client.send(&[
        Buffer::Readable(head.to_vec()),
        Buffer::Readable(tail.to_vec()),
        Buffer::Writable(3),
        Buffer::Writable(13),
        Buffer::Writable(4),
        Buffer::Writable(1),
        Buffer::Writable(5),
    ]);
    assert_eq!(client.reply(&used), Ok(b"0123456789".to_vec()));
    // Errors as well.
    let request = client.request(1000, node, &[]);
    let used = client.send(&[
        Buffer::Readable(request),
        Buffer::Writable(5),
        Buffer::Writable(20),
    ]);
    assert_eq!(client.reply(&used), Err(libc::ENOSYS));
}

#[test]
fn sizes_in_requests_are_only_wishes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "x").unwrap();
    let mut client = Client::new(dir.path());
    let node = client.lookup(ROOT, "f").unwrap().node;
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let read = fields()
        .u64(fh)
        .u64(0)
        .u32(u32::MAX)
        .u32(0)
        .u64(0)
        .u32(0)
        .u32(0);
    client.call(op::READ, node, read, 64).unwrap_err();
    // More to write than the request has: only what is there is written.
    let write = fields()
        .u64(fh)
        .u64(0)
        .u32(u32::MAX)
        .u32(0)
        .u64(0)
        .u32(0)
        .u32(0)
        .bytes(b"abc");
    let reply = client.call(op::WRITE, node, write, 8).unwrap();
    assert_eq!(u32_at(&reply, 0), 3);
    let directory = client.opendir(ROOT).unwrap();
    let list = fields()
        .u64(directory)
        .u64(0)
        .u32(u32::MAX)
        .u32(0)
        .u64(0)
        .u32(0)
        .u32(0);
    client.call(op::READDIR, ROOT, list, 64).unwrap_err();
    let forget = fields().u32(u32::MAX).u32(0).0;
    let request = client.request(op::BATCH_FORGET, 0, &forget);
    assert_eq!(client.send(&[Buffer::Readable(request)]).len, 0);
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"abc");
}

#[test]
fn an_impossible_ring_asks_for_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path());
    client.driver.queues[REQUEST].set_avail_idx(9999);
    client.driver.queues[REQUEST].kick();
    assert!(client.driver.wait_needs_reset().starts_with("fs: "));
    assert!(client.driver.runner.failures().is_empty());
}

/// Bodies with values that mean something now and then: nodes, handles, names.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![Just(0_u64), Just(1), Just(2), Just(3), any::<u64>()];
    let name = prop_oneof![
        Just("f".to_owned()),
        Just("..".to_owned()),
        Just("d".to_owned()),
        "[a-z/.]{0,12}"
    ];
    (vec(number, 0..6), vec(name, 0..3), vec(any::<u8>(), 0..40)).prop_map(
        |(numbers, names, bytes)| {
            let mut body = fields();
            for number in numbers {
                body = body.u64(number);
            }
            for name in names {
                body = body.name(&name);
            }
            body.bytes(&bytes).0
        },
    )
}

fn buffer() -> impl Strategy<Value = Buffer> {
    prop_oneof![
        2 => vec(any::<u8>(), 0..120).prop_map(Buffer::Readable),
        2 => (0..400_u32).prop_map(Buffer::Writable),
        1 => (any::<u64>(), any::<u32>(), 0..8_u16).prop_map(|(addr, len, flags)| {
            // Not NEXT: the driver chains.
            Buffer::Raw(RawDescriptor { addr, len, flags: flags & !1, next: 0 })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_stay_inside_and_never_panic(
        requests in vec((0_u32..52, 0_u64..6, body(), 0_u32..5000), 1..80),
        chains in vec(vec(buffer(), 1..5), 0..20),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir_all(share.join("d")).unwrap();
        fs::write(share.join("f"), "content").unwrap();
        fs::write(dir.path().join("outside"), "untouched").unwrap();
        let mut config = FsConfig::new("t", share);
        config.max_inodes = 16;
        config.max_handles = 16;
        let mut client = Client::with(config);
        for (opcode, node, body, room) in &requests {
            let request = client.request(*opcode, *node, body);
            client.send(&[Buffer::Readable(request), Buffer::Writable(*room)]);
        }
        for chain in &chains {
            client.send(chain);
        }
        client.init();
        client.mkdir(ROOT, "still-here").unwrap();
        prop_assert!(client.driver.runner.failures().is_empty());
        prop_assert!(client.driver.interrupt.needs_reset_reason().is_none());
        prop_assert_eq!(fs::read(dir.path().join("outside")).unwrap(), b"untouched");
        prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
