//! Requests to a disk.
#![no_main]

use std::fs::File;

use devices::virtio::block::{Backing, BackingOptions, Block, BlockConfig};
use fuzz::{Buffer, Result, Subject, TestGuest, Unstructured, random_chain, run};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

const SECTORS: u64 = 256;

struct Disk {
    image: NamedTempFile,
}

impl Subject for Disk {
    type Device = Block;

    fn device(&mut self, _: &TestGuest) -> Block {
        let (device, handle) = Block::new(BlockConfig::default()).unwrap();
        let backing = Backing::open(self.image.path(), BackingOptions::default()).unwrap();
        handle.attach(backing).unwrap();
        device
    }

    fn chain(&mut self, _: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if input.ratio(1, 4)? {
            return random_chain(input);
        }
        let mut header = Vec::with_capacity(16);
        header.extend(input.int_in_range(0..=16_u32)?.to_le_bytes());
        header.extend([0; 4]);
        header.extend(input.int_in_range(0..=SECTORS + 2)?.to_le_bytes());
        let data = if input.arbitrary()? {
            Buffer::Writable(512 * input.int_in_range(0..=8)?)
        } else {
            let len = (16 * input.int_in_range(0..=128)?).min(input.len());
            Buffer::Readable(input.bytes(len)?.to_vec())
        };
        Ok(vec![Buffer::Readable(header), data, Buffer::Writable(1)])
    }

    fn patience(&self) -> u16 {
        20
    }
}

fuzz_target!(|data: &[u8]| {
    let image = NamedTempFile::new().unwrap();
    File::set_len(image.as_file(), SECTORS * 512).unwrap();
    let mut disk = Disk { image };
    run(&mut disk, data);
    let size = disk.image.as_file().metadata().unwrap().len();
    assert_eq!(size, SECTORS * 512, "the guest resized its disk");
});
