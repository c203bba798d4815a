//! Descriptor chains on the socket device's queues.
#![no_main]

use devices::virtio::vsock::{Vsock, VsockConfig};
use fuzz::{Subject, TestGuest, run};
use libfuzzer_sys::fuzz_target;

struct Sockets;

impl Subject for Sockets {
    type Device = Vsock;

    fn device(&mut self, _: &TestGuest) -> Vsock {
        Vsock::new(VsockConfig::new(3)).unwrap().0
    }
}

fuzz_target!(|data: &[u8]| run(&mut Sockets, data));
