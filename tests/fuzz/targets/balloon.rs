//! Pages and statistics that a guest sends to the balloon.
#![no_main]

use std::sync::Arc;

use devices::virtio::balloon::{Balloon, BalloonConfig, BalloonHandle};
use devices::virtio::release::HostPages;
use fuzz::{Buffer, Result, Subject, TestGuest, Unstructured, random_chain, run};
use libfuzzer_sys::fuzz_target;

#[derive(Default)]
struct Ballooning {
    handle: Option<BalloonHandle>,
}

impl Subject for Ballooning {
    type Device = Balloon;

    fn device(&mut self, guest: &TestGuest) -> Balloon {
        let pages = Arc::new(HostPages::new(guest.memory()));
        let (device, handle) = Balloon::new(BalloonConfig::new(16 << 20), pages).unwrap();
        self.handle = Some(handle);
        device
    }

    fn chain(&mut self, _: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if input.ratio(1, 2)? {
            return random_chain(input);
        }
        // Numbers of pages most of which exist, above the first MiB with the queues.
        let count = input.int_in_range(0..=40)?;
        let numbers = (0..count)
            .map(|_| input.int_in_range(0x100..=0x1010_u32))
            .collect::<Result<Vec<_>>>()?;
        let bytes = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
        Ok(vec![Buffer::Readable(bytes)])
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if let Some(handle) = &self.handle {
            let _ = handle.set_target(input.int_in_range(0..=20 << 20)?);
            let _ = handle.request_stats();
        }
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| run(&mut Ballooning::default(), data));
