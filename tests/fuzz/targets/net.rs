//! Frames and control commands of a network card, with and without a tap behind it.
#![no_main]

use std::time::Duration;

use devices::virtio::net::{HEADER_BYTES, Net, NetConfig, NetHandle, TapDevice};
use fuzz::{Buffer, Result, Subject, TestGuest, Unstructured, random_chain, run};
use libfuzzer_sys::fuzz_target;
use nix::sched::{CloneFlags, unshare};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

#[derive(Default)]
struct Card {
    handle: Option<NetHandle>,
}

impl Subject for Card {
    type Device = Net;

    fn device(&mut self, _: &TestGuest) -> Net {
        let config = NetConfig {
            queue_pairs: 2,
            ..NetConfig::new(MAC)
        };
        let (device, handle) = Net::new(config).unwrap();
        self.handle = Some(handle);
        device
    }

    fn chain(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if input.ratio(1, 4)? {
            return random_chain(input);
        }
        if queue == 4 {
            // A control command: class, command, data; room for the acknowledgement.
            let len = input.int_in_range(0..=24_usize)?.min(input.len());
            let mut command = vec![input.int_in_range(0..=5)?, input.int_in_range(0..=4)?];
            command.extend(input.bytes(len)?);
            return Ok(vec![Buffer::Readable(command), Buffer::Writable(1)]);
        }
        if queue.is_multiple_of(2) {
            return Ok(vec![Buffer::Writable(input.int_in_range(0..=0x3000)?)]);
        }
        let mut frame = input.bytes(HEADER_BYTES.min(input.len()))?.to_vec();
        frame.resize(HEADER_BYTES, 0);
        let len = input.int_in_range(0..=2000_usize)?;
        frame.resize(HEADER_BYTES + len, 0x45);
        Ok(vec![Buffer::Readable(frame)])
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let Some(handle) = &self.handle else {
            return Ok(());
        };
        match input.int_in_range(0..=3)? {
            // Refused when there is one, and where there are no taps.
            0 => {
                if let Ok(tap) = TapDevice::open("fuzz%d", 1) {
                    let _ = handle.attach(tap);
                }
            }
            1 => {
                let _ = handle.detach(Duration::ZERO);
            }
            2 => {
                let _ = handle.set_link(input.arbitrary()?);
            }
            _ => {
                let _ = handle.announce();
            }
        }
        Ok(())
    }
}

thread_local! {
    /// Taps are made in a network namespace of their own, when that is allowed.
    static NAMESPACE: bool = unshare(CloneFlags::CLONE_NEWNET).is_ok();
}

fuzz_target!(|data: &[u8]| {
    NAMESPACE.with(|_| ());
    run(&mut Card::default(), data);
});
