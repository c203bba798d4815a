//! Requests to the memory device.
#![no_main]

use std::sync::Arc;

use devices::virtio::mem::{Mem, MemConfig, MemHandle};
use devices::virtio::release::HostPages;
use fuzz::{Buffer, Result, Subject, TestGuest, Unstructured, random_chain, run};
use libfuzzer_sys::fuzz_target;

const ADDRESS: u64 = 12 << 20;
const REGION: u64 = 4 << 20;
const BLOCK: u64 = 64 << 10;

#[derive(Default)]
struct Plugging {
    handle: Option<MemHandle>,
}

impl Subject for Plugging {
    type Device = Mem;

    fn device(&mut self, guest: &TestGuest) -> Mem {
        let config = MemConfig {
            address: ADDRESS,
            region_bytes: REGION,
            block_bytes: BLOCK,
            requested_bytes: REGION / 2,
        };
        let pages = Arc::new(HostPages::new(guest.memory()));
        let (device, handle) = Mem::new(&config, pages).unwrap();
        self.handle = Some(handle);
        device
    }

    fn chain(&mut self, _: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if input.ratio(1, 4)? {
            return random_chain(input);
        }
        let mut request = [0; 24];
        request[0] = input.int_in_range(0..=4)?;
        let address = ADDRESS + BLOCK * input.int_in_range(0..=70)?;
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16] = input.int_in_range(0..=70)?;
        Ok(vec![
            Buffer::Readable(request.to_vec()),
            Buffer::Writable(10),
        ])
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if let Some(handle) = &self.handle {
            let _ = handle.set_requested(BLOCK * input.int_in_range(0..=70)?);
            assert!(handle.plugged() <= REGION);
        }
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut subject = Plugging::default();
    run(&mut subject, data);
});
