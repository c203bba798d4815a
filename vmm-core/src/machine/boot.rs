//! A machine that boots a kernel.

use std::sync::Arc;

use super::frame::Frame;
use super::{BuildError, Machine, Phases, VmShell, cmdline};
use crate::arch::{self, Entry, Platform};
use crate::config::{Discovery, MachineConfig};
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::memory::{GuestRam, RamSize};
use crate::thread::VmThreads;
use crate::vcpu::VcpuState;

impl Machine {
    /// Builds the machine, ready to start: kernel loaded, devices connected, vCPUs waiting.
    ///
    /// # Errors
    /// A field of `config` that cannot be, or a step that the host refused; everything
    /// done until then is undone.
    pub fn build(host: &Host, config: MachineConfig) -> Result<Self, BuildError> {
        let phases = Arc::new(Phases::begin());
        config.validate(host)?;
        let shell = VmShell::create(host, config.vcpus)?;
        let size = RamSize {
            boot_bytes: config.memory_bytes,
            hotplug_bytes: config.devices.hotplug_bytes(),
        };
        let bytes = size.total_bytes();
        let ram = match config.huge_pages {
            true => GuestRam::huge(&config.name, size),
            false => GuestRam::new(&config.name, size),
        };
        let ram = ram.map_err(|source| BuildError::Memory { bytes, source })?;
        let threads = VmThreads::new(&config.name, ExitNotice::new())
            .map_err(BuildError::thread("system call filter"))?;
        let frame = Frame::new(threads, &config.console, shell, ram, config.devices, phases)?;
        let platform = Platform {
            vcpus: u8::try_from(config.vcpus).unwrap_or(u8::MAX),
            acpi: match config.discovery {
                Discovery::Auto => !host.emulated_ring0(),
                Discovery::Acpi => true,
                Discovery::CommandLine => false,
            },
            devices: frame
                .attached
                .iter()
                .map(|device| device.place)
                .chain(frame.disks.places())
                .collect(),
        };
        let cmdline = cmdline::build(host, platform.acpi, &platform.devices, &config.cmdline)?;
        let kernel = arch::Kernel {
            kernel: &config.kernel,
            initramfs: config.initramfs.as_deref(),
            cmdline: &cmdline,
            protocol: config.protocol,
        };
        let entry = arch::load(&frame.ram, &kernel, &platform)?;
        set_boot_state(host, &frame.shell, entry)?;
        frame.finish(host, cmdline, VcpuState::Created)
    }
}

fn set_boot_state(host: &Host, shell: &VmShell, entry: Entry) -> Result<(), BuildError> {
    let count = u8::try_from(shell.vcpus.len()).unwrap_or(u8::MAX);
    for (index, vcpu) in (0_u8..).zip(&shell.vcpus) {
        let cpuid =
            arch::guest_cpuid(host, index, count).map_err(BuildError::kvm("report its CPUID"))?;
        let entry = (index == 0).then_some(entry);
        arch::configure_vcpu(vcpu, &cpuid, entry)
            .map_err(BuildError::kvm("set a vCPU's boot state"))?;
    }
    Ok(())
}
