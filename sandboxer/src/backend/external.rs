//! Pods in VMs of an external hypervisor.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use external_hv::cloud_hypervisor::CloudHypervisor;
use external_hv::qemu::Qemu;
use external_hv::stratovirt::StratoVirt;
use external_hv::{ExternalVm, MachineSpec, hypervisor, supervisor};
use tracing::warn;
use vmm_core::Host;
use vmm_core::vm::{Vm, VmError};

use super::vmm::BackendError;
use super::{Built, MachineRequest, SandboxBackend, check_folder, guest_environment};
use crate::causes::with_causes;
use crate::config::{Config, GuestFiles, HypervisorKind, accel};

/// Makes VMs of one hypervisor.
#[derive(Debug)]
pub struct ExternalBackend {
    hypervisor: Arc<dyn hypervisor::Hypervisor>,
    config: Config,
    guest: GuestFiles,
    supervisor: PathBuf,
    environment: BTreeMap<String, String>,
    slow: bool,
    outlives_daemon: bool,
}

impl ExternalBackend {
    /// Finds the hypervisor's program, the guest and what this host can do.
    ///
    /// # Errors
    /// One of them is missing.
    pub async fn new(config: &Config, outlives_daemon: bool) -> Result<Self, BackendError> {
        let config = config.clone();
        // The probe runs a throw-away VM.
        tokio::task::spawn_blocking(move || Self::probe(config, outlives_daemon))
            .await
            .unwrap_or_else(|e| Err(BackendError::Supervisor(e.to_string())))
    }

    fn probe(config: Config, outlives_daemon: bool) -> Result<Self, BackendError> {
        let guest = config.vm.guest_files()?;
        let supervisor = supervisor_program(&config)?;
        let host = Host::probe().map_err(|e| with_causes(&e));
        let environment = host.as_ref().map(guest_environment).unwrap_or_default();
        let emulated = host.as_ref().is_ok_and(Host::emulated_ring0);
        let (hypervisor, on_host, translated) = match config.hypervisor.kind {
            HypervisorKind::Qemu => {
                let mut qemu = config.hypervisor.qemu.clone();
                qemu.accel = accel(qemu.accel);
                let (qemu, notice) = Qemu::new(qemu, &host)?;
                if let Some(notice) = notice {
                    warn!("{notice}");
                }
                let (on_host, translated) = (qemu.emulated_ring0(), qemu.translates());
                let qemu: Arc<dyn hypervisor::Hypervisor> = Arc::new(qemu);
                (qemu, on_host, translated)
            }
            HypervisorKind::CloudHypervisor => {
                let vmm = config.hypervisor.cloud_hypervisor.clone();
                let vmm = CloudHypervisor::new(vmm, &host)?;
                (Arc::new(vmm) as _, emulated, false)
            }
            HypervisorKind::StratoVirt => {
                let vmm = StratoVirt::new(config.hypervisor.stratovirt.clone(), &host)?;
                (Arc::new(vmm) as _, emulated, false)
            }
        };
        if config.fs.dax.as_u64() > 0 {
            warn!("fs.dax has no effect: only in-process VMs have a window onto files");
        }
        Ok(Self {
            slow: on_host || translated,
            environment: if on_host {
                environment
            } else {
                BTreeMap::new()
            },
            hypervisor,
            config,
            guest,
            supervisor,
            outlives_daemon,
        })
    }

    fn spec(&self, request: MachineRequest) -> MachineSpec {
        let (vm, fs) = (&self.config.vm, &self.config.fs);
        MachineSpec {
            name: request.pod,
            vcpus: request.vcpus,
            memory_bytes: request.memory_bytes,
            kernel: self.guest.kernel.clone(),
            initramfs: Some(self.guest.initramfs.clone()),
            cmdline: vm.kernel_params.clone(),
            dir: request.dir,
            share: request.share,
            share_tag: agent_api::SHARE_TAG.to_owned(),
            share_workers: fs.workers,
            share_cache: fs.cache.into(),
            console_cap_bytes: vm.serial_log_bytes.as_u64(),
            net_slots: vm.net_slots,
            disk_slots: vm.disk_slots,
            balloon: vm.balloon,
            control_port: agent_api::CONTROL_PORT,
            most: vm.most(request.vcpus, request.memory_bytes),
            api_limit: self.config.hypervisor.api_timeout,
            outlives_daemon: self.outlives_daemon,
        }
    }
}

/// As configured, or the one installed beside the running program.
fn supervisor_program(config: &Config) -> Result<PathBuf, BackendError> {
    let path = match &config.hypervisor.supervisor {
        Some(path) => path.clone(),
        None => {
            let own = std::env::current_exe();
            let own = own.map_err(|e| BackendError::Supervisor(e.to_string()))?;
            own.with_file_name(supervisor::PROGRAM)
        }
    };
    hypervisor::check_program("hypervisor.supervisor", &path)?;
    Ok(path)
}

#[async_trait]
impl SandboxBackend for ExternalBackend {
    fn name(&self) -> &'static str {
        self.hypervisor.name()
    }

    fn slow_kernel(&self) -> bool {
        self.slow
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        self.environment.clone()
    }

    fn outlives_daemon(&self) -> bool {
        self.outlives_daemon
    }

    async fn recover(&self, request: MachineRequest) -> Result<Option<Arc<dyn Vm>>, VmError> {
        let hypervisor = Arc::clone(&self.hypervisor);
        let spec = self.spec(request);
        let found = ExternalVm::find(hypervisor, spec, self.supervisor.clone()).await?;
        Ok(found.map(|vm| Arc::new(vm) as _))
    }

    async fn build(&self, request: MachineRequest) -> Result<Built, VmError> {
        // The longest name of a socket.
        check_folder(&request.dir, "vsock.sock_1024")?;
        let hypervisor = Arc::clone(&self.hypervisor);
        let vm = ExternalVm::new(hypervisor, self.spec(request), self.supervisor.clone());
        Ok(Arc::new(vm).into())
    }
}
