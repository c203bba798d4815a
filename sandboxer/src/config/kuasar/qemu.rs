//! `config_qemu_*.toml`: QEMU.

use bytesize::ByteSize;
use external_hv::qemu::MachineType;
use serde::Deserialize;
use vmm_core::config::MAX_VCPUS;

use super::{Common, File, Translation, Virtiofsd, file};
use crate::config::{Config, HypervisorKind};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Qemu {
    qemu_path: Option<String>,
    vcpus: Option<u32>,
    memory_in_mb: Option<u64>,
    kernel_path: Option<String>,
    image_path: Option<String>,
    initrd_path: Option<String>,
    kernel_params: Option<String>,
    firmware: Option<String>,
    firmware_path: Option<String>,
    machine_type: Option<String>,
    machine_accelerators: Option<String>,
    cpu_model: Option<String>,
    cpu_features: Option<String>,
    default_bridges: Option<u32>,
    default_max_vcpus: u32,
    entropy_source: Option<String>,
    mem_slots: Option<u32>,
    mem_offset: u64,
    memory_path: Option<String>,
    file_backend_mem_path: Option<String>,
    mem_prealloc: bool,
    enable_mem_prealloc: bool,
    hugepages: bool,
    enable_vhost_user_store: bool,
    enable_swap: bool,
    enable_iothreads: bool,
    msize_9p: Option<u32>,
    virtio_9p_direct_io: bool,
    virtio_9p_multidevs: Option<String>,
    block_device_driver: Option<String>,
    disable_nvdimm: Option<bool>,
    share_fs: Option<String>,
    use_vsock: Option<bool>,
    virtiofs_daemon_path: Option<String>,
    virtiofs_cache: Option<String>,
    virtiofs_extra_args: Vec<String>,
    virtiofs_cache_size: u64,
    debug: bool,
    virtiofsd: Virtiofsd,
}

pub(super) fn config(file_: File<Qemu>) -> Config {
    let mut qemu = file_.hypervisor;
    let common = Common {
        vcpus: qemu.vcpus,
        memory_in_mb: qemu.memory_in_mb,
        kernel_path: qemu.kernel_path.take(),
        initrd_path: qemu.initrd_path.take(),
        kernel_params: qemu.kernel_params.take(),
        debug: qemu.debug,
    };
    let mut translation = Translation::new(file_.sandbox, common);
    launch(&mut translation, &mut qemu);
    in_vain(&mut translation, &qemu);
    translation.cache(qemu.virtiofs_cache.as_deref(), "hypervisor.virtiofs_cache");
    translation.virtiofsd("hypervisor.virtiofsd", &qemu.virtiofsd);
    translation.config
}

/// Keys that change the launch.
fn launch(translation: &mut Translation, qemu: &mut Qemu) {
    let memory = translation.config.vm.memory;
    let hypervisor = &mut translation.config.hypervisor;
    hypervisor.kind = HypervisorKind::Qemu;
    let table = &mut hypervisor.qemu;
    if let Some(path) = file(qemu.qemu_path.take()) {
        table.path = path;
    }
    if let Some(source) = file(qemu.entropy_source.take()) {
        table.entropy_source = source;
    }
    let machine = qemu.machine_type.take().unwrap_or_default();
    let (board, options) = machine.split_once(',').unwrap_or((&machine, ""));
    let known = match board {
        "pc" | "" => Some(MachineType::Pc),
        "q35" => Some(MachineType::Q35),
        "microvm" => Some(MachineType::Microvm),
        "virt" => Some(MachineType::Virt),
        _ => None,
    };
    table.machine = known.unwrap_or(MachineType::Pc);
    let more = qemu.machine_accelerators.take().unwrap_or_default();
    let parts = [options, more.as_str()];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    table.machine_options = parts.join(",");
    table.cpu = qemu.cpu_model.take().unwrap_or_default();
    table.cpu_features = qemu.cpu_features.take().unwrap_or_default();
    let most = qemu.default_max_vcpus.min(MAX_VCPUS);
    translation.config.vm.max_vcpus = (most > 0).then_some(most);
    let table = &mut translation.config.hypervisor.qemu;
    if let Some(slots) = qemu.mem_slots.filter(|slots| *slots > 0) {
        table.memory_slots = slots;
        // Slots are of use with room for memory: as much again for each.
        let most = memory
            .as_u64()
            .saturating_mul(u64::from(slots).saturating_add(1));
        translation.config.vm.max_memory = Some(ByteSize::b(most));
    }
    let table = &mut translation.config.hypervisor.qemu;
    table.memory_path =
        file(qemu.memory_path.take()).or_else(|| file(qemu.file_backend_mem_path.take()));
    table.prealloc = qemu.mem_prealloc || qemu.enable_mem_prealloc;
    table.hugepages = qemu.hugepages;
    table.iothread = qemu.enable_iothreads;
    table.firmware = file(qemu.firmware_path.take()).or_else(|| file(qemu.firmware.take()));
    table.image = file(qemu.image_path.take());
    translation.no_effect(
        known.is_none(),
        "hypervisor.machine_type",
        &format!("{board:?} is no board that is known; \"pc\" is used"),
    );
}

/// Keys that are accepted and change nothing.
fn in_vain(translation: &mut Translation, qemu: &Qemu) {
    let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let is = |text: &Option<String>, what: &str| text.as_deref() == Some(what);
    let virtiofs = "the share is virtio-fs, served by this daemon's own device";
    let keys = [
        (
            qemu.default_bridges.is_some(),
            "default_bridges",
            "devices are plugged into the board",
        ),
        (qemu.mem_offset > 0, "mem_offset", "there is no NVDIMM"),
        (
            qemu.enable_vhost_user_store,
            "enable_vhost_user_store",
            "disks are files and block devices",
        ),
        (
            qemu.enable_swap,
            "enable_swap",
            "guest memory can be swapped unless hypervisor.qemu.lock_memory is set",
        ),
        (qemu.msize_9p.is_some(), "msize_9p", virtiofs),
        (qemu.virtio_9p_direct_io, "virtio_9p_direct_io", virtiofs),
        (
            given(&qemu.virtio_9p_multidevs),
            "virtio_9p_multidevs",
            virtiofs,
        ),
        (is(&qemu.share_fs, "Virtio9P"), "share_fs", virtiofs),
        (
            given(&qemu.virtiofs_daemon_path),
            "virtiofs_daemon_path",
            virtiofs,
        ),
        (
            !qemu.virtiofs_extra_args.is_empty(),
            "virtiofs_extra_args",
            virtiofs,
        ),
        (
            qemu.virtiofs_cache_size > 0,
            "virtiofs_cache_size",
            "only in-process VMs have a DAX window",
        ),
        (
            is(&qemu.block_device_driver, "VirtioScsi"),
            "block_device_driver",
            "disks are virtio-blk",
        ),
        (
            qemu.disable_nvdimm == Some(false),
            "disable_nvdimm",
            "the image is a disk",
        ),
        (
            qemu.use_vsock == Some(false),
            "use_vsock",
            "the agent is reached over vsock",
        ),
    ];
    for (set, key, why) in keys {
        translation.no_effect(set, &format!("hypervisor.{key}"), why);
    }
}
