//! Well-formed vsock packets in any order and with any fields, with both ends on the host:
//! a listener, and connections to the guest.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use devices::virtio::vsock::{Vsock, VsockConfig, VsockHandle};
use fuzz::{Buffer, Result, Subject, TestGuest, Unstructured, run};
use libfuzzer_sys::fuzz_target;
use tokio::sync::{mpsc, oneshot};

const GUEST: u64 = 3;
const HOST: u64 = 2;
/// Ports are few, so that packets meet connections.
const PORTS: [u32; 4] = [0, 1024, 1025, u32::MAX];
const LISTENED: u32 = 1024;

#[derive(Default)]
struct Packets {
    handle: Option<VsockHandle>,
    listener: Option<mpsc::Receiver<UnixStream>>,
    dialled: Vec<oneshot::Receiver<std::io::Result<UnixStream>>>,
    streams: Vec<UnixStream>,
}

impl Packets {
    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        self.streams.push(stream);
    }
}

impl Subject for Packets {
    type Device = Vsock;

    fn device(&mut self, _: &TestGuest) -> Vsock {
        let config = VsockConfig {
            max_connections: 8,
            ..VsockConfig::new(3)
        };
        let (device, handle) = Vsock::new(config).unwrap();
        self.listener = Some(handle.listen(LISTENED).unwrap());
        self.handle = Some(handle);
        device
    }

    fn chain(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<Vec<Buffer>> {
        if queue != 1 {
            return Ok(vec![Buffer::Writable(input.int_in_range(0..=0x2000)?)]);
        }
        let payload_len = input.int_in_range(0..=1024_usize)?.min(input.len());
        let claimed = if input.ratio(7, 8)? {
            u32::try_from(payload_len).unwrap_or(0)
        } else {
            input.arbitrary()?
        };
        let mut packet = Vec::with_capacity(44 + payload_len);
        let unlikely = input.ratio(1, 16)?;
        let (source, target): (u64, u64) = if unlikely {
            (input.arbitrary()?, input.arbitrary()?)
        } else {
            (GUEST, HOST)
        };
        packet.extend(source.to_le_bytes());
        packet.extend(target.to_le_bytes());
        packet.extend(input.choose(&PORTS)?.to_le_bytes());
        packet.extend(input.choose(&PORTS)?.to_le_bytes());
        packet.extend(claimed.to_le_bytes());
        packet.extend(
            input
                .int_in_range(1..=if unlikely { 3_u16 } else { 1 })?
                .to_le_bytes(),
        );
        packet.extend(input.int_in_range(0..=8_u16)?.to_le_bytes());
        packet.extend(input.int_in_range(0..=4_u32)?.to_le_bytes());
        // Credit: plausible or not.
        for _ in 0..2 {
            let value = if input.arbitrary()? {
                input.int_in_range(0..=0x1_0000_u32)?
            } else {
                input.arbitrary()?
            };
            packet.extend(value.to_le_bytes());
        }
        packet.extend(input.bytes(payload_len.min(input.len()))?);
        Ok(vec![Buffer::Readable(packet)])
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let Some(handle) = &self.handle else {
            return Ok(());
        };
        match input.int_in_range(0..=7)? {
            0 => self.dialled.push(handle.connect(*input.choose(&PORTS)?)),
            1 => {
                self.dialled.pop();
            }
            2 => handle.reset_transport(),
            3 => {
                let accepted = self.listener.as_mut().and_then(|l| l.try_recv().ok());
                let dialled = self.dialled.last_mut().and_then(|d| d.try_recv().ok());
                for stream in accepted.into_iter().chain(dialled.and_then(|d| d.ok())) {
                    self.keep(stream);
                }
            }
            4 => {
                self.streams.pop();
            }
            5 => {
                if let Some(mut stream) = self.streams.last() {
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            _ => {
                if let Some(mut stream) = self.streams.last() {
                    let _ = stream.write(&[7; 4096][..input.int_in_range(0..=4096)?]);
                }
            }
        }
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| run(&mut Packets::default(), data));
