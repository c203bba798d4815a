//! The device, driven as a guest would.

mod chains;
mod faults;
mod requests;
mod slots;

use std::fs::File;
use std::os::unix::fs::FileExt;

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::{Backing, BackingOptions, Block, BlockConfig, BlockHandle, Engine};
use crate::testing::{Buffer, DeviceDriver, RawDescriptor, VirtQueueDriver, process};
use crate::virtio::VirtioDevice;

const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];
const IOERR: u8 = VIRTIO_BLK_S_IOERR.to_le_bytes()[0];
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP.to_le_bytes()[0];
/// What a status byte holds before the device writes it.
const UNANSWERED: u8 = 0xff;
const WRITE: u16 = 2;

/// Runs `test` with every engine this host has.
fn each_engine(test: impl Fn(Engine)) {
    test(Engine::Sync);
    match super::engine::uring::Ring::new() {
        Ok(_) => test(Engine::Uring),
        Err(reason) => println!("skipped: io_uring: {reason}"),
    }
}

/// A device with a file, and its guest.
struct Disk {
    driver: DeviceDriver<Block>,
    handle: BlockHandle,
    file: NamedTempFile,
}

fn config(engine: Engine) -> BlockConfig {
    BlockConfig {
        serial: "a serial".to_owned(),
        engine,
        ..BlockConfig::default()
    }
}

fn open(file: &NamedTempFile, read_only: bool) -> Backing {
    let options = BackingOptions {
        read_only,
        ..BackingOptions::default()
    };
    Backing::open(file.path(), options).unwrap()
}

impl Disk {
    /// Active, with a file of `bytes` attached.
    fn new(config: BlockConfig, bytes: u64) -> Self {
        let mut disk = Self::inactive(config, bytes);
        disk.driver.activate().unwrap();
        disk
    }

    fn inactive(config: BlockConfig, bytes: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let read_only = config.read_only;
        let (device, handle) = Block::new(config).unwrap();
        handle.attach(open(&file, read_only)).unwrap();
        Self {
            driver: DeviceDriver::new(device),
            handle,
            file,
        }
    }

    fn file(&self) -> &File {
        self.file.as_file()
    }

    fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// A writable descriptor of one byte, and its address.
    fn status(&self) -> (Buffer, u64) {
        let addr = self.driver.guest.place(&[UNANSWERED]);
        (raw(addr, 1, WRITE), addr)
    }

    /// Sends a chain with a status byte at its end; returns that and the used length.
    fn send(&mut self, mut buffers: Vec<Buffer>) -> (u8, u32) {
        let (buffer, addr) = self.status();
        buffers.push(buffer);
        let used = self.driver.request(0, &buffers);
        (self.driver.guest.read(addr, 1)[0], used.len)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let head = Buffer::Readable(header(VIRTIO_BLK_T_OUT, sector));
        let (status, used) = self.send(vec![head, Buffer::Readable(data.to_vec())]);
        assert_eq!(used, 1);
        status
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let addr = self.driver.guest.alloc(u64::from(len).max(1));
        let head = Buffer::Readable(header(VIRTIO_BLK_T_IN, sector));
        let (status, used) = self.send(vec![head, raw(addr, len, WRITE)]);
        let good = if status == OK {
            len + 1
        } else {
            u32::from(len == 0)
        };
        assert_eq!(used, good);
        (status, self.driver.guest.read(addr, len as usize))
    }

    fn flush(&mut self) -> u8 {
        self.send(vec![Buffer::Readable(header(VIRTIO_BLK_T_FLUSH, 0))])
            .0
    }

    /// A discard or write-zeroes request of (sector, sectors, flags).
    fn extents(&mut self, kind: u32, extents: &[(u64, u32, u32)]) -> u8 {
        let mut data = Vec::new();
        for (sector, sectors, flags) in extents {
            data.extend(sector.to_le_bytes());
            data.extend(sectors.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        let head = Buffer::Readable(header(kind, 0));
        self.send(vec![head, Buffer::Readable(data)]).0
    }

    fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.driver.device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// The same device with another guest, activated.
    fn start_over(&mut self) {
        let mut fresh = DeviceDriver::new(Block::new(config(Engine::Sync)).unwrap().0);
        fresh.queues.truncate(0);
        std::mem::swap(&mut fresh.device, &mut self.driver.device);
        for size in fresh.device.queue_sizes() {
            fresh.queues.push(VirtQueueDriver::new(&fresh.guest, *size));
        }
        self.driver = fresh;
        self.driver.activate().unwrap();
    }

    /// The device still works.
    fn check(&mut self) {
        assert_eq!(self.write(1, &[0x5a; 512]), OK);
        assert_eq!(self.read(1, 512), (OK, vec![0x5a; 512]));
        assert!(self.driver.runner.failures().is_empty());
    }
}

fn raw(addr: u64, len: u32, flags: u16) -> Buffer {
    Buffer::Raw(RawDescriptor {
        addr,
        len,
        flags,
        next: 0,
    })
}

/// `struct virtio_blk_req` up to its data (5.2.6).
fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let step = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(step).take(len).collect()
}
