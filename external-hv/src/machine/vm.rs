//! [`Vm`] for [`ExternalVm`].

use std::time::Duration;

use async_trait::async_trait;
use devices::virtio::net::TapDevice;
use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::{
    Disk, DiskPlace, ExitReason, GuestListener, GuestStream, Vm, VmError, VmSize, VmStats,
};

use super::{ExternalVm, lock};
use crate::capability::Capability;
use crate::hypervisor::Nic;
use crate::vsock::{self, PortListener};

#[async_trait]
impl Vm for ExternalVm {
    fn backend(&self) -> &'static str {
        self.shared.hypervisor.name()
    }

    async fn start(&self) -> Result<(), VmError> {
        self.shared.ensure_running()?;
        let launched = self.launch().await;
        if launched.is_err()
            && let Some(running) = self.shared.running.get()
        {
            running.supervisor.kill();
        }
        launched
    }

    async fn stop(&self, deadline: Duration) -> Result<(), VmError> {
        self.shared.report(ExitReason::Stopped);
        let Some(running) = self.shared.running.get() else {
            return Ok(());
        };
        running.supervisor.terminate();
        let mut gone = self.shared.gone.subscribe();
        if timeout(deadline, gone.wait_for(|gone| *gone)).await.is_ok() {
            return Ok(());
        }
        // One that does not react, or is stopped, ends by this.
        running.supervisor.kill();
        let gone = timeout(deadline, gone.wait_for(|gone| *gone)).await;
        gone.map(drop).map_err(|_| VmError::Deadline {
            what: "stopping the VM",
            limit: deadline,
        })
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.shared.exit.subscribe()
    }

    async fn connect(
        &self,
        port: u32,
        deadline: Duration,
    ) -> Result<Box<dyn GuestStream>, VmError> {
        self.shared.ensure_running()?;
        let mut exited = self.shared.exit.subscribe();
        let socket = self.shared.layout.vsock();
        tokio::select! {
            stream = vsock::connect(&socket, port, deadline) => {
                stream.map(|stream| Box::new(stream) as _)
            }
            _ = exited.wait_for(Option::is_some) => {
                self.shared.ensure_running()?;
                Err(VmError::Exited(ExitReason::Stopped))
            }
        }
    }

    fn listen(&self, port: u32) -> Result<Box<dyn GuestListener>, VmError> {
        self.shared.ensure_running()?;
        let socket = self.shared.layout.vsock();
        Ok(Box::new(PortListener::bind(
            &socket,
            port,
            &self.ports,
            self.exited(),
        )?))
    }

    fn pid(&self) -> u32 {
        let running = self.shared.running.get();
        running.map_or_else(std::process::id, |running| running.supervisor.vmm_pid())
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        let control = self.shared.running.get().and_then(|r| r.control.get());
        control.map_or_else(Vec::new, |control| control.vcpu_threads())
    }

    fn host_processes(&self) -> Vec<i32> {
        let running = self.shared.running.get();
        let pids = running.map(|r| [r.supervisor.pid(), r.supervisor.vmm_pid()]);
        let pids = pids.into_iter().flatten();
        pids.filter_map(|pid| i32::try_from(pid).ok()).collect()
    }

    fn stats(&self) -> VmStats {
        VmStats {
            exits: Default::default(),
            phases: lock(&self.shared.phases).clone(),
            memory_bytes: lock(&self.shared.size).memory_bytes,
            resident_bytes: self.shared.running.get().and_then(|running| {
                let pid = i32::try_from(running.supervisor.vmm_pid()).ok()?;
                let memory = procfs::process::Process::new(pid).ok()?.statm().ok()?;
                memory.resident.checked_mul(procfs::page_size())
            }),
        }
    }

    fn net_slots(&self) -> usize {
        usize::try_from(self.shared.spec.net_slots).unwrap_or(usize::MAX)
    }

    async fn attach_nic(&self, slot: usize, tap: TapDevice) -> Result<(), VmError> {
        self.shared.ensure_running()?;
        if slot >= self.net_slots() {
            return Err(VmError::NoNetSlot {
                slot,
                slots: self.net_slots(),
            });
        }
        let nic = Nic {
            slot,
            queues: tap.into_fds(),
        };
        if self.shared.running.get().is_some() {
            self.ensure_can(Capability::NetworkHotplug, "plug in a network card")?;
            return self.control()?.attach_nic(nic).await;
        }
        let mut nics = lock(&self.nics);
        if nics.iter().any(|other| other.slot == slot) {
            return Err(VmError::Io {
                what: format!("network slot {slot} is taken"),
                source: std::io::ErrorKind::AlreadyExists.into(),
            });
        }
        nics.push(nic);
        Ok(())
    }

    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        if self.shared.running.get().is_some() {
            self.ensure_can(Capability::NetworkHotplug, "unplug a network card")?;
            return self.control()?.detach_nic(slot, deadline).await;
        }
        lock(&self.nics).retain(|nic| nic.slot != slot);
        Ok(())
    }

    fn disk_slots(&self) -> usize {
        let plugs = self
            .shared
            .hypervisor
            .backend()
            .can(Capability::DiskHotplug);
        let slots = if plugs {
            self.shared.spec.disk_slots
        } else {
            0
        };
        usize::try_from(slots).unwrap_or(usize::MAX)
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<DiskPlace, VmError> {
        self.ensure_can(Capability::DiskHotplug, "plug in a disk")?;
        let slots = self.disk_slots();
        if slot >= slots {
            return Err(VmError::NoDiskSlot { slot, slots });
        }
        self.control()?.attach_disk(slot, disk).await?;
        Ok(DiskPlace::Serial)
    }

    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        self.ensure_can(Capability::DiskHotplug, "unplug a disk")?;
        self.control()?.detach_disk(slot, deadline).await
    }

    fn resizable(&self) -> Option<(VmSize, VmSize)> {
        let backend = self.shared.hypervisor.backend();
        let grows = backend.can(Capability::VcpuHotplug) && backend.can(Capability::MemoryHotplug);
        grows.then(|| (*lock(&self.shared.size), self.shared.spec.most))
    }

    async fn resize(&self, size: VmSize, deadline: Duration) -> Result<VmSize, VmError> {
        self.ensure_can(Capability::MemoryHotplug, "change its size")?;
        let control = self.control()?;
        let resized = async {
            control.resize(size).await?;
            control.size().await
        };
        let size = timeout(deadline, resized).await.unwrap_or_else(|_| {
            Err(VmError::Deadline {
                what: "changing the VM's size",
                limit: deadline,
            })
        })?;
        *lock(&self.shared.size) = size;
        Ok(size)
    }

    fn mark_phase(&self, phase: &'static str) {
        self.shared.mark_phase(phase);
    }

    fn console_tail(&self) -> Option<String> {
        self.shared.console_tail()
    }

    async fn pause(&self) -> Result<(), VmError> {
        self.control()?.pause().await
    }

    async fn resume(&self) -> Result<(), VmError> {
        self.control()?.resume().await
    }
}
