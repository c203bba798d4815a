//! The kernel's command line.

use crate::arch::{MmioDevice, layout};
use crate::config::ConfigError;
use crate::host::Host;

/// Console on the serial port; a panic resets at once, by the keyboard controller, which
/// every KVM carries out (a triple fault cannot be emulated everywhere).
const BASE: [&str; 3] = ["console=ttyS0", "reboot=k", "panic=-1"];

/// The machine's own parameters, then the configured ones: of two that contradict each
/// other the kernel takes the later.
pub(super) fn build(
    host: &Host,
    acpi: bool,
    devices: &[MmioDevice],
    configured: &str,
) -> Result<String, ConfigError> {
    let mut words: Vec<String> = BASE.iter().map(|word| (*word).to_owned()).collect();
    words.extend(
        host.kernel_parameters()
            .iter()
            .map(|word| (*word).to_owned()),
    );
    // The kernel passes on what it does not know: NAME=value becomes init's environment.
    words.extend(
        host.guest_environment()
            .iter()
            .map(|(name, value)| format!("{name}={value}")),
    );
    if !acpi {
        words.push("acpi=off".to_owned());
        words.extend(devices.iter().map(device_parameter));
    }
    if !configured.trim().is_empty() {
        words.push(configured.trim().to_owned());
    }
    let line = words.join(" ");
    // One byte for the end of the string.
    let most = layout::CMDLINE_BYTES.saturating_sub(1);
    if line.len() > most {
        return Err(ConfigError::CmdlineTooLong {
            value: line.len(),
            most,
        });
    }
    Ok(line)
}

fn device_parameter(device: &MmioDevice) -> String {
    format!(
        "virtio_mmio.device={}K@{:#x}:{}",
        device.bytes / 1024,
        device.address,
        device.irq
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_kernel_reads_them() {
        let device = MmioDevice {
            address: 0xd000_1000,
            bytes: 0x1000,
            irq: 6,
        };
        assert_eq!(
            device_parameter(&device),
            "virtio_mmio.device=4K@0xd0001000:6"
        );
    }
}
