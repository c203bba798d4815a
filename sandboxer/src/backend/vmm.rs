//! Pods in microVMs that run as threads of this process.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use devices::virtio::fs::{Fs, FsConfig, ShareRoot};
use devices::virtio::net::NetConfig;
use devices::virtio::vsock::VsockConfig;
use external_hv::HvError;
use tracing::warn;
use vmm_core::config::{ConsoleLog, Discovery};
use vmm_core::host::HostError;
use vmm_core::memory::HUGE_PAGE_BYTES;
use vmm_core::vm::{Disk, Vm, VmError};
use vmm_core::{
    BuildError, CloneConfig, DeviceSet, Host, Identity, Machine, MachineConfig, Snapshot,
};

use super::{Built, MachineRequest, SandboxBackend, guest_environment};
use crate::agent::Limits;
use crate::causes::with_causes;
use crate::config::{self, Config, DeviceDiscovery, GuestFiles, MissingGuestFile, TemplateMode};
use crate::template::{
    BuildTemplateError, MakeWarm, TemplateKey, TemplateMachine, TemplateManager, TemplateParts,
    TemplateStore, WarmClone, nowhere,
};

/// Address of every guest; nothing is routed by it.
const GUEST_CID: u32 = 3;

/// Longest name of a machine.
const MAX_NAME_BYTES: usize = 64;

/// Name of machines that are nobody's yet.
const WARM: &str = "warm";

/// Name of the console log in the pod's folder.
const CONSOLE_LOG: &str = "console.log";

/// Name of the socket for `CONNECT` clients in the pod's folder.
const VSOCK_SOCKET: &str = "vsock.sock";

/// Why this host cannot run microVMs.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// KVM cannot be used.
    #[error("this host cannot run microVMs: {0}")]
    Host(#[from] HostError),
    /// There is nothing to boot.
    #[error(transparent)]
    Guest(#[from] MissingGuestFile),
    /// The external hypervisor cannot be run.
    #[error(transparent)]
    Hypervisor(#[from] HvError),
    /// The program beside each external VM cannot be found.
    #[error("cannot find the supervisor of external VMs: {0}")]
    Supervisor(String),
}

impl BackendError {
    /// What to do about it, unless the message says so.
    #[must_use]
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::Host(error) => Some(error.fix()),
            Self::Guest(_) | Self::Hypervisor(_) | Self::Supervisor(_) => None,
        }
    }
}

/// Makes microVMs inside this process.
#[derive(Debug)]
pub struct VmmBackend {
    host: Host,
    /// See [`SandboxBackend::identity`].
    identity: String,
    guest: GuestFiles,
    vm: config::Vm,
    fs: config::Fs,
    /// Of the agents in templates and warm clones.
    limits: Limits,
    templates: Option<Templates>,
}

/// Where clones come from.
#[derive(Debug)]
struct Templates {
    manager: Arc<TemplateManager>,
    parts: TemplateParts,
}

/// The devices of every machine, in order, before its network slots; a template has the same.
const DEVICES: &str = "share rng vsock";

/// Address of a card until the pod's own is known; nobody sees it. The last byte is the slot.
const FIRST_MAC: [u8; 6] = [0x02, b'k', b'u', b'a', 0, 0];

impl VmmBackend {
    /// Checks that this host can run microVMs.
    ///
    /// # Errors
    /// KVM cannot be used, or there is no guest to boot.
    pub async fn new(config: &Config) -> Result<Self, BackendError> {
        let config = config.clone();
        // The probe runs a throw-away VM, and the guest's files are read.
        let backend = tokio::task::spawn_blocking(move || Self::probe(config))
            .await
            .map_err(|e| HostError::Probe(e.to_string()))??;
        if let Some(templates) = &backend.templates {
            let vcpus = backend.vm.most(backend.vm.vcpus, 0).vcpus;
            templates.manager.refill(vcpus);
        }
        Ok(backend)
    }

    fn probe(config: Config) -> Result<Self, BackendError> {
        let host = Host::probe()?;
        let guest = config.vm.guest_files()?;
        let identity = host
            .fingerprint()
            .map_err(|e| HostError::Probe(with_causes(&e)))?;
        let timeouts = if host.emulated_ring0() {
            config.timeouts.for_slow_host()
        } else {
            config.timeouts.clone()
        };
        let templates = match config.templates.mode {
            TemplateMode::Off => None,
            TemplateMode::Auto if config.vm.huge_pages => {
                warn!("pods boot instead of being cloned: vm.huge_pages is set");
                None
            }
            TemplateMode::Auto => Self::templates(&config, &host, &identity, &guest)
                .inspect_err(|why| warn!("pods boot instead of being cloned: {why}"))
                .ok(),
        };
        Ok(Self {
            host,
            identity,
            guest,
            vm: config.vm,
            fs: config.fs,
            limits: Limits::from(&timeouts),
            templates,
        })
    }

    fn templates(
        config: &Config,
        host: &Host,
        identity: &str,
        guest: &GuestFiles,
    ) -> Result<Templates, String> {
        let settings = &config.templates;
        let folder = settings.folder().map_err(|e| with_causes(&e))?;
        let store = TemplateStore::open(&folder).map_err(|e| with_causes(&e))?;
        let parts = TemplateParts::new(identity, guest, &config.vm).map_err(|e| with_causes(&e))?;
        let manager = TemplateManager::new(host.clone(), store, guest.clone(), settings);
        Ok(Templates { manager, parts })
    }

    /// Names the template for a machine of this size; none where templates are off.
    #[must_use]
    pub fn template_key(&self, vcpus: u32, memory_bytes: u64) -> Option<TemplateKey> {
        let templates = self.templates.as_ref()?;
        Some(
            templates
                .parts
                .key(vcpus, memory_bytes, &self.device_names()),
        )
    }

    /// The template for a machine of this size, built if there is none yet.
    ///
    /// # Errors
    /// Why there can be none, as text.
    pub async fn template(&self, vcpus: u32, memory_bytes: u64) -> Result<Snapshot, String> {
        let Some(templates) = &self.templates else {
            return Err("templates are switched off".to_owned());
        };
        let key = templates
            .parts
            .key(vcpus, memory_bytes, &self.device_names());
        let mut machine = self.guest_config("template", vcpus, memory_bytes);
        let (fs, vm, limit) = (self.fs.clone(), self.vm.clone(), self.limits.boot);
        let make = move |share: &Path| {
            machine.devices = devices(&fs, &vm, memory_bytes, share.to_owned(), None)
                .map_err(BuildTemplateError::Start)?;
            Ok(TemplateMachine {
                config: machine,
                limit,
            })
        };
        let found = templates.manager.get(&key, make).await;
        found.map_err(|err| with_causes(&*err))
    }

    /// Gives the pod a clone that was made ahead of it, if there is one.
    async fn adopt_warm(&self, templates: &Templates, request: &MachineRequest) -> Option<Built> {
        let key = self.template_key(request.vcpus, request.memory_bytes)?;
        // A clone's disk slots are empty.
        if !request.disks.is_empty() {
            return None;
        }
        let WarmClone { machine, connected } = templates.manager.warm().take(&key)?;
        let identity = Identity {
            name: machine_name(&request.pod),
            console: self.console(request),
            share: request.share.clone(),
            vsock_socket: self.vsock_socket(request),
        };
        let adopting = Arc::clone(&machine);
        let adopted = tokio::task::spawn_blocking(move || adopting.adopt(identity)).await;
        match adopted.map_err(backend_error).flatten() {
            Ok(()) => {
                // Has the template, or this one would not be.
                if let Ok(template) = self.template(request.vcpus, request.memory_bytes).await {
                    self.warm_up(templates, request, &template);
                }
                Some(Built {
                    vm: machine,
                    met: Some(connected),
                })
            }
            Err(err) => {
                warn!(
                    pod = request.pod,
                    "a warm clone is of no use: {}",
                    with_causes(&err)
                );
                None
            }
        }
    }

    /// Waits until a clone waits for a pod.
    pub async fn warm_clone_waits(&self) {
        if let Some(templates) = &self.templates {
            templates.manager.warm().wait().await;
        }
    }

    /// Makes clones for later pods like this one, in the background.
    fn warm_up(&self, templates: &Templates, request: &MachineRequest, template: &Snapshot) {
        let Some(key) = self.template_key(request.vcpus, request.memory_bytes) else {
            return;
        };
        let (fs, vm, memory_bytes) = (self.fs.clone(), self.vm.clone(), request.memory_bytes);
        let (host, template, limits) = (self.host.clone(), template.clone(), self.limits);
        let make: MakeWarm = Arc::new(move || {
            let (fs, vm) = (fs.clone(), vm.clone());
            let (host, template) = (host.clone(), template.clone());
            Box::pin(async move {
                let share = nowhere().map_err(io_error("making room for a share"))?;
                let config = CloneConfig {
                    name: WARM.to_owned(),
                    console: ConsoleLog::default(),
                    devices: devices(&fs, &vm, memory_bytes, share, None)?,
                };
                let restore = move || Machine::restore(&host, config, &template, None);
                WarmClone::meet(blocking(restore).await?, limits).await
            })
        });
        templates.manager.warm().refill(&key, make);
    }

    fn vsock_socket(&self, request: &MachineRequest) -> Option<PathBuf> {
        self.vm.vsock_uds.then(|| request.dir.join(VSOCK_SOCKET))
    }

    fn console(&self, request: &MachineRequest) -> ConsoleLog {
        ConsoleLog {
            path: Some(request.dir.join(CONSOLE_LOG)),
            cap_bytes: self.vm.serial_log_bytes.as_u64(),
            echo: false,
        }
    }

    fn devices(&self, request: &MachineRequest) -> Result<DeviceSet, VmError> {
        let socket = self.vsock_socket(request);
        let memory_bytes = request.memory_bytes;
        let share = request.share.clone();
        let devices = devices(&self.fs, &self.vm, memory_bytes, share, socket)?;
        let plug = |devices: DeviceSet, (slot, disk): &(usize, Disk)| {
            if *slot >= devices.disk_slots() {
                return Err(VmError::NoDiskSlot {
                    slot: *slot,
                    slots: devices.disk_slots(),
                });
            }
            Ok(devices.with_disk(*slot, disk.clone()))
        };
        request.disks.iter().try_fold(devices, plug)
    }

    /// Names what [`devices`] makes.
    fn device_names(&self) -> String {
        let vm = &self.vm;
        format!(
            "{DEVICES} net*{} disk*{} balloon={} max_memory={:?} max_vcpus={:?} dax={}",
            vm.net_slots,
            vm.disk_slots,
            vm.gives_memory_back(),
            vm.max_memory,
            vm.max_vcpus,
            self.fs.dax.as_u64()
        )
    }

    /// What a template and the machines that boot have in common.
    fn guest_config(&self, name: &str, vcpus: u32, memory_bytes: u64) -> MachineConfig {
        let mut machine = MachineConfig::new(name, &self.guest.kernel);
        machine.vcpus = self.vm.most(vcpus, memory_bytes).vcpus;
        machine.memory_bytes = memory_bytes;
        machine.huge_pages = self.vm.huge_pages;
        if machine.huge_pages {
            let rounded = memory_bytes.checked_next_multiple_of(HUGE_PAGE_BYTES);
            machine.memory_bytes = rounded.unwrap_or(memory_bytes);
        }
        machine.initramfs = Some(self.guest.initramfs.clone());
        machine.cmdline.clone_from(&self.vm.kernel_params);
        if machine.vcpus > vcpus {
            // The agent brings the others online when they are needed.
            machine.cmdline = format!("{} maxcpus={vcpus}", machine.cmdline);
        }
        machine.discovery = match self.vm.discovery {
            DeviceDiscovery::Auto => Discovery::Auto,
            DeviceDiscovery::Acpi => Discovery::Acpi,
            DeviceDiscovery::CommandLine => Discovery::CommandLine,
        };
        machine
    }

    fn machine_config(&self, request: &MachineRequest) -> Result<MachineConfig, VmError> {
        let name = machine_name(&request.pod);
        let mut machine = self.guest_config(&name, request.vcpus, request.memory_bytes);
        machine.console = self.console(request);
        machine.devices = self.devices(request)?;
        Ok(machine)
    }

    fn clone_config(&self, request: &MachineRequest) -> Result<CloneConfig, VmError> {
        Ok(CloneConfig {
            name: machine_name(&request.pod),
            console: self.console(request),
            devices: self.devices(request)?,
        })
    }
}

/// What [`DEVICES`] lists, and slots for cards and disks.
fn devices(
    fs: &config::Fs,
    vm: &config::Vm,
    memory_bytes: u64,
    share: impl Into<ShareRoot>,
    vsock_socket: Option<PathBuf>,
) -> Result<DeviceSet, VmError> {
    let mut share = FsConfig::new(agent_api::SHARE_TAG, share);
    share.workers = fs.workers;
    share.cache = fs.cache.into();
    share.dax_bytes = fs.dax.as_u64();
    let share = Fs::new(share).map_err(backend_error)?;
    let mut vsock = VsockConfig::new(GUEST_CID);
    vsock.uds_path = vsock_socket;
    let mut devices = DeviceSet::new()
        .with_share(share)
        .with_rng()
        .map_err(io_error("opening the entropy device"))?
        .with_vsock(vsock)
        .map_err(io_error("making the vsock device"))?;
    for slot in 0..vm.net_slots {
        let [.., last] = slot.to_be_bytes();
        let mut mac = FIRST_MAC;
        if let Some(byte) = mac.last_mut() {
            *byte = last;
        }
        devices = devices
            .with_net(NetConfig::new(mac))
            .map_err(backend_error)?;
    }
    if vm.gives_memory_back() {
        devices = devices.with_balloon();
    }
    let most = vm.most(0, memory_bytes).memory_bytes;
    let more = most.saturating_sub(memory_bytes);
    let slots = usize::try_from(vm.disk_slots).unwrap_or(usize::MAX);
    Ok(devices.with_hotplug_memory(more).with_disk_slots(slots))
}

#[async_trait]
impl SandboxBackend for VmmBackend {
    fn name(&self) -> &'static str {
        "in-process"
    }

    fn slow_kernel(&self) -> bool {
        self.host.emulated_ring0()
    }

    fn guest_environment(&self) -> BTreeMap<String, String> {
        guest_environment(&self.host)
    }

    async fn prepare(&self, request: &MachineRequest) {
        if self.templates.is_some() {
            // A failure is told when the machine is built.
            let _ = self.template(request.vcpus, request.memory_bytes).await;
        }
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    async fn restore(
        &self,
        request: MachineRequest,
        dir: &Path,
        label: &str,
    ) -> Result<Arc<dyn Vm>, VmError> {
        let config = self.clone_config(&request)?;
        let (host, dir, label) = (self.host.clone(), dir.to_owned(), label.to_owned());
        let load = move || Snapshot::open(&dir, &label);
        let snapshot = tokio::task::spawn_blocking(load)
            .await
            .map_err(backend_error)?
            .map_err(backend_error)?;
        let machine = blocking(move || Machine::restore(&host, config, &snapshot, None)).await?;
        Ok(Arc::new(machine))
    }

    async fn build(&self, request: MachineRequest) -> Result<Built, VmError> {
        let host = self.host.clone();
        let Some(templates) = &self.templates else {
            return boot(host, self.machine_config(&request)?).await;
        };
        if let Some(warm) = self.adopt_warm(templates, &request).await {
            return Ok(warm);
        }
        let template = self.template(request.vcpus, request.memory_bytes).await;
        let cloned = match template {
            Ok(template) => {
                let vcpus = self.vm.most(request.vcpus, 0).vcpus;
                let shell = templates.manager.shell(vcpus);
                let config = self.clone_config(&request)?;
                self.warm_up(templates, &request, &template);
                blocking(move || Machine::restore(&host, config, &template, shell))
                    .await
                    .map_err(|err| with_causes(&err))
            }
            Err(why) => Err(why),
        };
        match cloned {
            Ok(machine) => Ok(Arc::new(machine).into()),
            Err(why) => {
                warn!(pod = request.pod, "booting instead of cloning: {why}");
                boot(self.host.clone(), self.machine_config(&request)?).await
            }
        }
    }
}

async fn boot(host: Host, config: MachineConfig) -> Result<Built, VmError> {
    let machine = blocking(move || Machine::build(&host, config)).await?;
    Ok(Arc::new(machine).into())
}

/// Makes something off the async threads.
async fn blocking<T: Send + 'static>(
    make: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, VmError> {
    tokio::task::spawn_blocking(make)
        .await
        .map_err(backend_error)?
        .map_err(backend_error)
}

/// The pod's id as far as a machine's name can hold it.
fn machine_name(pod: &str) -> String {
    pod.chars()
        .map(|c| if c == '+' { '_' } else { c })
        .take(MAX_NAME_BYTES)
        .collect()
}

fn backend_error(error: impl Error + Send + Sync + 'static) -> VmError {
    VmError::Backend(Box::new(error))
}

fn io_error(what: &str) -> impl FnOnce(std::io::Error) -> VmError {
    let what = what.to_owned();
    move |source| VmError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_pods_become_names_of_machines() {
        assert_eq!(machine_name("a+b.c_d-e"), "a_b.c_d-e");
        assert_eq!(machine_name(&"x".repeat(200)).len(), MAX_NAME_BYTES);
    }
}
