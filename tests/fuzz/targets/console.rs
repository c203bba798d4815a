//! Console queues with a stream attached.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use devices::virtio::console::{Console, ConsoleHandle};
use fuzz::{Result, Subject, TestGuest, Unstructured, run};
use libfuzzer_sys::fuzz_target;

#[derive(Default)]
struct Terminal {
    handle: Option<ConsoleHandle>,
    stream: Option<UnixStream>,
}

impl Subject for Terminal {
    type Device = Console;

    fn device(&mut self, _: &TestGuest) -> Console {
        let (device, handle) = Console::new(Some(Box::new(std::io::sink()))).unwrap();
        self.handle = Some(handle);
        device
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let Some(handle) = &self.handle else {
            return Ok(());
        };
        match (input.int_in_range(0..=6)?, &mut self.stream) {
            (0, _) => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                handle.attach(theirs).unwrap();
                self.stream = Some(ours);
            }
            (1, _) => handle.detach().unwrap(),
            (2, _) => handle
                .resize(input.arbitrary()?, input.arbitrary()?)
                .unwrap(),
            (3, Some(stream)) => {
                let _ = stream.write(&[7; 5000][..input.int_in_range(0..=5000)?]);
            }
            (4, Some(stream)) => {
                let _ = stream.read(&mut [0; 5000]);
            }
            (5, Some(stream)) => {
                let _ = stream.shutdown(Shutdown::Write);
            }
            _ => self.stream = None,
        }
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| run(&mut Terminal::default(), data));
