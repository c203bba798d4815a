//! A machine with memory and devices and no state yet: what booting and restoring have in
//! common.

use std::sync::{Arc, Mutex};

use devices::event_loop::EventLoop;
use devices::legacy::{ConsoleOptions, ConsoleOutput};
use devices::virtio::fs::FsHandle;
use devices::virtio::mem::MemHandle;
use devices::virtio::net::NetHandle;
use devices::virtio::vsock::VsockHandle;
use tokio::sync::watch;

use super::disks::Disks;
use super::elastic::Elastic;
use super::live::Live;
use super::wiring::{self, Attached, Legacy};
use super::{BuildError, Machine, Phases, VmShell};
use crate::config::ConsoleLog;
use crate::device_set::{DeviceSet, NamedDevice};
use crate::exit::ExitNotice;
use crate::host::Host;
use crate::memory::GuestRam;
use crate::thread::VmThreads;
use crate::vcpu::{Buses, Vcpu, VcpuGroup, VcpuState};
use crate::vm::ExitCounts;

/// See the module.
pub(super) struct Frame {
    exit: ExitNotice,
    phases: Arc<Phases>,
    console: ConsoleOutput,
    threads: VmThreads,
    event_loop: EventLoop,
    buses: Buses,
    share: Option<FsHandle>,
    vsock: Option<VsockHandle>,
    nets: Vec<NetHandle>,
    pub(super) shell: VmShell,
    pub(super) ram: GuestRam,
    pub(super) legacy: Legacy,
    pub(super) attached: Vec<Attached>,
    pub(super) disks: Disks,
    mem: Option<MemHandle>,
}

impl Frame {
    /// Maps `ram` into the shell's VM and puts the devices around it.
    pub(super) fn new(
        threads: VmThreads,
        console: &ConsoleLog,
        shell: VmShell,
        ram: GuestRam,
        devices: DeviceSet,
        phases: Arc<Phases>,
    ) -> Result<Self, BuildError> {
        let console = open_console(console)?;
        let exit = threads.exit().clone();
        exit.reads(&console);
        shell
            .vm
            .map_memory(ram.clone())
            .map_err(BuildError::kvm("map guest memory"))?;
        phases.mark_first(Phases::MEMORY_MAPPED);
        let event_loop = EventLoop::start("dev", Arc::new(threads.clone()))
            .map_err(BuildError::thread("event loop"))?;
        event_loop
            .runner()
            .post(threads.watcher())
            .map_err(BuildError::thread("event loop"))?;
        let mut buses = Buses::default();
        let legacy =
            wiring::legacy(&shell.vm, &console, &exit, &mut buses.pio).map_err(|source| {
                BuildError::Device {
                    name: "legacy".to_owned(),
                    source,
                }
            })?;
        let DeviceSet {
            devices,
            share,
            vsock,
            nets,
            balloon,
            hotplug_bytes,
            disks: slots,
        } = devices;
        let elastic = Elastic::new(&ram, balloon, hotplug_bytes)?;
        let devices = devices.into_iter().chain(elastic.devices).collect();
        let attached = attach(devices, &shell, &ram, &event_loop, &mut buses)?;
        let disks = Disks::new(
            Arc::clone(&shell.vm),
            Arc::clone(ram.guest_memory()),
            event_loop.runner(),
            attached.len(),
            slots.len(),
            &mut buses.mmio,
        )
        .map_err(|source| BuildError::Device {
            name: "disk slots".to_owned(),
            source,
        })?;
        for (slot, disk) in slots.iter().enumerate() {
            if let Some(disk) = disk {
                disks
                    .plug(slot, disk)
                    .map_err(|source| BuildError::Disk { slot, source })?;
            }
        }
        phases.mark_first(Phases::DEVICES_ATTACHED);
        Ok(Self {
            exit,
            phases,
            console,
            threads,
            event_loop,
            buses,
            share,
            vsock,
            nets,
            shell,
            ram,
            legacy,
            attached,
            disks,
            mem: elastic.mem,
        })
    }

    /// The machine, its vCPUs waiting in `state`.
    pub(super) fn finish(
        self,
        host: &Host,
        cmdline: String,
        state: VcpuState,
    ) -> Result<Machine, BuildError> {
        let VmShell {
            vcpus,
            vm,
            run_bytes,
        } = self.shell;
        let group = VcpuGroup::new(vcpus.iter(), run_bytes, state)
            .map_err(BuildError::thread("vCPU threads"))?;
        self.exit.stops(&group);
        self.phases.counts(&group);
        let buses = Arc::new(self.buses);
        let members: Vec<_> = (0..)
            .zip(vcpus)
            .map(|(index, fd)| {
                let vcpu = Vcpu::new(
                    index,
                    fd,
                    Arc::clone(&vm),
                    Arc::clone(&buses),
                    self.exit.clone(),
                    Arc::clone(&self.phases),
                );
                Arc::new(Mutex::new(vcpu))
            })
            .collect();
        let live = Live {
            vcpus: group,
            members: members.clone(),
            devices: self.attached,
            disks: self.disks,
            legacy: self.legacy,
            event_loop: Mutex::new(self.event_loop),
            vm,
        };
        live.vcpus
            .spawn(members, &self.threads)
            .map_err(BuildError::thread("vCPU threads"))?;
        self.phases.mark_first(Phases::VM_BUILT);
        let memory_bytes = self.ram.bytes();
        tracing::info!(
            pod = self.threads.machine(),
            vcpus = live.members.len(),
            memory_bytes,
            "machine built"
        );
        Ok(Machine {
            host: host.clone(),
            threads: self.threads,
            exit: self.exit,
            phases: self.phases,
            console: self.console,
            cmdline,
            memory_bytes,
            share: self.share,
            vsock: self.vsock,
            nets: self.nets,
            mem: self.mem,
            live: Mutex::new(Some(Arc::new(live))),
            final_exits: Mutex::new(ExitCounts::new()),
            torn_down: watch::Sender::new(false),
        })
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

fn attach(
    devices: Vec<NamedDevice>,
    shell: &VmShell,
    ram: &GuestRam,
    event_loop: &EventLoop,
    buses: &mut Buses,
) -> Result<Vec<Attached>, BuildError> {
    let mut attached = Vec::with_capacity(devices.len());
    for (index, device) in devices.into_iter().enumerate() {
        let name = device.name.clone();
        let result = wiring::virtio(&shell.vm, ram, event_loop, index, device, &mut buses.mmio);
        attached.push(result.map_err(|source| BuildError::Device { name, source })?);
    }
    Ok(attached)
}
