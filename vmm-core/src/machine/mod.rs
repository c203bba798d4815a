//! The in-process machine.
//!
//! Built in stages, each of which a restored machine can take from elsewhere:
//! [`shell`](self) (VM, interrupt controllers, vCPUs), memory, devices, boot state.

mod cmdline;
mod error;
mod live;
mod phases;
mod shell;
mod vm;
mod wiring;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::event_loop::EventLoop;
use devices::legacy::{ConsoleOptions, ConsoleOutput};
use devices::virtio::vsock::VsockHandle;
use tokio::sync::watch;

pub use self::error::BuildError;
use self::live::Live;
pub(crate) use self::phases::Phases;
use self::shell::Shell;
use crate::arch::{self, Platform};
use crate::config::{ConsoleLog, Discovery, MachineConfig, NamedDevice};
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::memory::GuestRam;
use crate::thread::VmThreads;
use crate::vcpu::{Buses, Vcpu, VcpuGroup, VcpuState};

/// A virtual machine whose vCPUs and devices are threads of this process.
///
/// Dropping it ends it: when drop returns its threads are joined, its memory is freed and
/// its sockets are removed. Operations are those of [`crate::vm::Vm`].
#[derive(Debug)]
pub struct Machine {
    name: String,
    exit: ExitNotice,
    phases: Arc<Phases>,
    console: ConsoleOutput,
    cmdline: String,
    memory_bytes: u64,
    vsock: Option<VsockHandle>,
    live: Mutex<Option<Arc<Live>>>,
    /// Exits counted by a machine that was torn down.
    final_exits: Mutex<BTreeMap<&'static str, u64>>,
    torn_down: watch::Sender<bool>,
}

impl Machine {
    /// Builds the machine, ready to start: kernel loaded, devices connected, vCPUs waiting.
    ///
    /// # Errors
    /// A field of `config` that cannot be, or a step that the host refused; everything
    /// done until then is undone.
    pub fn build(host: &Host, config: MachineConfig) -> Result<Self, BuildError> {
        let phases = Arc::new(Phases::begin());
        config.validate(host)?;
        let exit = ExitNotice::new();
        let console = open_console(&config.console)?;
        exit.reads(&console);

        let vcpu_count = u8::try_from(config.vcpus).unwrap_or(u8::MAX);
        let shell = Shell::create(host, vcpu_count).map_err(BuildError::kvm("create a VM"))?;
        let ram = give_memory(&shell, &config)?;

        let threads = VmThreads::new(&config.name, exit.clone());
        let event_loop = EventLoop::start("dev", Arc::new(threads.clone())).map_err(|source| {
            BuildError::Thread {
                what: "event loop",
                source,
            }
        })?;
        let mut buses = Buses::default();
        wiring::legacy(&shell.vm, &console, &exit, &mut buses.pio).map_err(|source| {
            BuildError::Device {
                name: "legacy".to_owned(),
                source,
            }
        })?;
        let attached = attach(config.devices, &shell, &ram, &event_loop, &mut buses)?;

        let platform = Platform {
            vcpus: vcpu_count,
            acpi: match config.discovery {
                Discovery::Auto => !host.emulated_ring0(),
                Discovery::Acpi => true,
                Discovery::CommandLine => false,
            },
            devices: attached.iter().map(|device| device.place).collect(),
        };
        let cmdline = cmdline::build(host, platform.acpi, &platform.devices, &config.cmdline)?;
        let kernel = arch::Kernel {
            kernel: &config.kernel,
            initramfs: config.initramfs.as_deref(),
            cmdline: &cmdline,
        };
        let entry = arch::load(&ram, &kernel, &platform)?;
        set_boot_state(host, &shell, entry)?;

        let vcpus = VcpuGroup::new(shell.vcpus.iter(), shell.run_bytes).map_err(thread_error)?;
        exit.stops(&vcpus);
        let live = Live {
            vcpus,
            devices: attached
                .into_iter()
                .map(|device| device.transport)
                .collect(),
            event_loop: Mutex::new(event_loop),
            buses: Arc::new(buses),
            vm: shell.vm,
        };
        let members = (0..)
            .zip(shell.vcpus)
            .map(|(index, fd)| {
                Vcpu::new(
                    index,
                    fd,
                    Arc::clone(&live.vm),
                    Arc::clone(&live.buses),
                    exit.clone(),
                    Arc::clone(&phases),
                )
            })
            .collect();
        live.vcpus.spawn(members, &threads).map_err(thread_error)?;
        phases.mark_first(Phases::VM_BUILT);
        tracing::info!(
            pod = config.name,
            vcpus = config.vcpus,
            memory_bytes = config.memory_bytes,
            "machine built"
        );
        Ok(Self {
            name: config.name,
            exit,
            phases,
            console,
            cmdline,
            memory_bytes: config.memory_bytes,
            vsock: config.vsock,
            live: Mutex::new(Some(Arc::new(live))),
            final_exits: Mutex::new(BTreeMap::new()),
            torn_down: watch::Sender::new(false),
        })
    }

    /// The kernel's complete command line.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }

    /// States of the vCPUs; empty once the machine was stopped.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<VcpuState> {
        self.live()
            .map_or_else(Vec::new, |live| live.vcpus.states())
    }

    fn live(&self) -> Option<Arc<Live>> {
        self.lock_live().clone()
    }

    fn lock_live(&self) -> MutexGuard<'_, Option<Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the running parts, keeping their figures.
    fn take_live(&self) -> Option<Arc<Live>> {
        let live = self.lock_live().take()?;
        self.console.finish();
        *self
            .final_exits
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = sum_exits(&live);
        Some(live)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.exit.report(crate::vm::ExitReason::Stopped);
        if let Some(live) = self.take_live() {
            live.tear_down();
        }
    }
}

fn sum_exits(live: &Live) -> BTreeMap<&'static str, u64> {
    let mut sums = BTreeMap::new();
    for counters in live.vcpus.all_counters() {
        counters.add_to(&mut sums);
    }
    sums
}

fn thread_error(source: std::io::Error) -> BuildError {
    BuildError::Thread {
        what: "vCPU threads",
        source,
    }
}

fn open_console(log: &ConsoleLog) -> Result<ConsoleOutput, BuildError> {
    ConsoleOutput::new(ConsoleOptions {
        path: log.path.clone(),
        cap_bytes: log.cap_bytes,
        echo: log.echo,
    })
    .map_err(|source| BuildError::Console {
        path: log.path.clone().unwrap_or_default(),
        source,
    })
}

fn give_memory(shell: &Shell, config: &MachineConfig) -> Result<GuestRam, BuildError> {
    let bytes = config.memory_bytes;
    let ram = GuestRam::new(&config.name, bytes)
        .map_err(|source| BuildError::Memory { bytes, source })?;
    shell
        .vm
        .map_memory(ram.clone())
        .map_err(BuildError::kvm("map guest memory"))?;
    Ok(ram)
}

fn attach(
    devices: Vec<NamedDevice>,
    shell: &Shell,
    ram: &GuestRam,
    event_loop: &EventLoop,
    buses: &mut Buses,
) -> Result<Vec<wiring::Attached>, BuildError> {
    let mut attached = Vec::with_capacity(devices.len());
    for (index, device) in devices.into_iter().enumerate() {
        let name = device.name.clone();
        let result = wiring::virtio(&shell.vm, ram, event_loop, index, device, &mut buses.mmio);
        attached.push(result.map_err(|source| BuildError::Device { name, source })?);
    }
    Ok(attached)
}

fn set_boot_state(host: &Host, shell: &Shell, entry: u64) -> Result<(), BuildError> {
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

#[cfg(test)]
mod tests;
