//! Descriptor chains on the file system device's queues.
#![no_main]

use std::path::PathBuf;

use devices::virtio::fs::{Fs, FsConfig};
use fuzz::{Subject, TestGuest, confined, fresh_dir, run};
use libfuzzer_sys::fuzz_target;

struct Share(PathBuf);

impl Subject for Share {
    type Device = Fs;

    fn device(&mut self, _: &TestGuest) -> Fs {
        Fs::new(FsConfig::new("share", self.0.clone())).unwrap()
    }

    fn patience(&self) -> u16 {
        10
    }
}

fuzz_target!(|data: &[u8]| confined("share", |root| {
    run(&mut Share(fresh_dir(root, "share")), data);
}));
