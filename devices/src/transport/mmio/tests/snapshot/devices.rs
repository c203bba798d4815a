//! Each device carries on.

use super::*;
use crate::virtio::console::Console;
use crate::virtio::fs::{Fs, FsConfig};
use crate::virtio::mem::{Mem, MemConfig};
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::vsock::{Vsock, VsockConfig};

#[test]
fn rng() {
    carries_on(
        || Box::new(Rng::new().unwrap()),
        |vm, number| {
            vm.queues[0].add(&[Buffer::Writable(number.into())]);
            0
        },
        |_, number, used| assert_eq!(used.len, u32::from(number)),
    );
}

/// Each request appends its number to a file, so to say: a lost or repeated one shows.
#[test]
fn block() {
    for engine in [Engine::Sync, Engine::Auto] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(256 * 512).unwrap();
        let fresh = || {
            let (device, handle) = Block::new(BlockConfig {
                engine,
                ..BlockConfig::default()
            })
            .unwrap();
            let backing = Backing::open(file.path(), BackingOptions::default()).unwrap();
            handle.attach(backing).unwrap();
            Box::new(device) as Box<dyn VirtioDevice>
        };
        carries_on(
            fresh,
            |vm, number| {
                let mut header = 1_u64.to_le_bytes().to_vec();
                header.extend(u64::from(number).to_le_bytes());
                vm.queues[0].add(&[
                    Buffer::Readable(header),
                    Buffer::Readable(vec![number; 512]),
                    Buffer::Writable(1),
                ]);
                0
            },
            |_, number, used| {
                assert_eq!(used.data, [0]);
                let bytes = std::fs::read(file.path()).unwrap();
                let at = usize::from(number) * 512;
                assert_eq!(bytes[at..at + 512], [number; 512]);
            },
        );
    }
}

#[test]
fn net() {
    carries_on(
        || Box::new(Net::new(NetConfig::new([2, 0, 0, 0, 0, 7])).unwrap().0),
        |vm, number| {
            vm.queues[1].add(&[Buffer::Readable(vec![0; 12 + usize::from(number)])]);
            1
        },
        |_, _, used| assert_eq!(used.len, 0),
    );
}

#[test]
fn balloon() {
    carries_on(
        || {
            let config = BalloonConfig::new(16 << 20);
            Box::new(Balloon::new(config, Arc::new(Release)).unwrap().0)
        },
        |vm, number| {
            let page = u32::from(number).to_le_bytes().to_vec();
            let queue = usize::from(number % 2);
            vm.queues[queue].add(&[Buffer::Readable(page)]);
            queue
        },
        |_, _, used| assert_eq!(used.len, 0),
    );
}

/// Plugs and unplugs block 3 in turn: what came twice or not at all is refused.
#[test]
fn mem() {
    let plugged = std::cell::Cell::new(false);
    carries_on(
        || {
            let config = MemConfig {
                requested_bytes: 64 << 20,
                ..MemConfig::new(1 << 30, 64 << 20)
            };
            Box::new(Mem::new(&config, Arc::new(Release)).unwrap().0)
        },
        |vm, _| {
            let mut request = u16::from(plugged.get()).to_le_bytes().to_vec();
            plugged.set(!plugged.get());
            request.extend([0; 6]);
            request.extend(((1_u64 << 30) + (6 << 20)).to_le_bytes());
            request.extend([1, 0, 0, 0, 0, 0, 0, 0]);
            vm.queues[0].add(&[Buffer::Readable(request), Buffer::Writable(10)]);
            0
        },
        |_, _, used| assert_eq!(used.data[..2], [0, 0]),
    );
}

#[test]
fn console() {
    carries_on(
        || Box::new(Console::new(None).unwrap().0),
        |vm, number| {
            vm.queues[1].add(&[Buffer::Readable(vec![number; 10])]);
            1
        },
        |_, _, used| assert_eq!(used.len, 0),
    );
}

#[test]
fn vsock() {
    carries_on(
        || Box::new(Vsock::new(VsockConfig::new(3)).unwrap().0),
        |vm, number| {
            // A reset, which nobody answers.
            let mut packet = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
            packet.extend([number; 8]);
            packet.extend([0, 0, 0, 0, 1, 0, 3, 0]);
            packet.resize(44, 0);
            vm.queues[1].add(&[Buffer::Readable(packet)]);
            1
        },
        |_, _, used| assert_eq!(used.len, 0),
    );
}

#[test]
fn fs() {
    let dir = tempfile::tempdir().unwrap();
    carries_on(
        || Box::new(Fs::new(FsConfig::new("share", dir.path().to_owned())).unwrap()),
        |vm, number| {
            // GETATTR of the root.
            let mut request = [56, 0, 0, 0, 3, 0, 0, 0, number, 0, 0, 0, 0, 0, 0, 0, 1].to_vec();
            request.resize(56, 0);
            vm.queues[1].add(&[Buffer::Readable(request), Buffer::Writable(120)]);
            1
        },
        |_, number, used| {
            assert_eq!(used.data[4..9], [0, 0, 0, 0, number]);
            assert_eq!(used.len, 120);
        },
    );
}
