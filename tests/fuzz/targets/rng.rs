//! Requests to the entropy device.
#![no_main]

use devices::virtio::rng::Rng;
use fuzz::{Subject, TestGuest, run};
use libfuzzer_sys::fuzz_target;

struct Entropy;

impl Subject for Entropy {
    type Device = Rng;

    fn device(&mut self, _: &TestGuest) -> Rng {
        Rng::new().unwrap()
    }
}

fuzz_target!(|data: &[u8]| run(&mut Entropy, data));
