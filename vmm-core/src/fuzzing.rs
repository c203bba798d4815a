//! What fuzz targets reach of the parts that read files.

use std::io;
use std::path::Path;

use crate::arch::{self, Kernel, MmioDevice, Platform};
use crate::config::BootProtocol;
use crate::memory::GuestRam;
use crate::snapshot;

/// What the file `state` with content `bytes` would be written as.
///
/// # Errors
/// When it cannot be read.
pub fn rewrite_state(bytes: &[u8]) -> io::Result<Vec<u8>> {
    snapshot::rewrite(bytes)
}

/// A file `state` with a valid header and digest around any content.
#[must_use]
pub fn seal_state(content: &[u8]) -> Vec<u8> {
    snapshot::seal(content)
}

/// Puts a kernel and an initramfs into fresh guest memory.
///
/// # Errors
/// When they are not what they should be, or do not fit.
pub fn load_kernel(
    kernel: &Path,
    initramfs: Option<&Path>,
    memory_bytes: u64,
    acpi: bool,
    pvh: bool,
) -> Result<(), Box<dyn std::error::Error>> {
    let ram = GuestRam::new("fuzz", memory_bytes)?;
    let source = Kernel {
        kernel,
        initramfs,
        cmdline: "console=ttyS0",
        protocol: match pvh {
            true => BootProtocol::Pvh,
            false => BootProtocol::Auto,
        },
    };
    let device = MmioDevice {
        address: arch::layout::MMIO_DEVICES,
        bytes: 0x1000,
        irq: 5,
    };
    let platform = Platform {
        vcpus: 2,
        devices: vec![device],
        acpi,
    };
    arch::load(&ram, &source, &platform)?;
    Ok(())
}
