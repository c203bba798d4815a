//! A kernel image and an initramfs of any content, into guest memory.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use fuzz::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vmm_core::fuzzing::load_kernel;

const MEMORY: u64 = 64 << 20;
const INITRAMFS_BYTES: u64 = 0x2000;

fn file(content: &[u8]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let (acpi, initramfs, zeroes, pvh): (bool, bool, bool, bool) = input.arbitrary()?;
    let (kernel, path) = file(input.bytes(input.len())?);
    if zeroes {
        // Segments may lie far into the file.
        kernel.set_len(1 << 20).unwrap();
    }
    let (other, other_path) = file(&[]);
    other.set_len(INITRAMFS_BYTES).unwrap();
    let initramfs = initramfs.then_some(&*other_path);
    let _ = load_kernel(&path, initramfs, MEMORY, acpi, pvh);
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = play(&mut Unstructured::new(data));
});
