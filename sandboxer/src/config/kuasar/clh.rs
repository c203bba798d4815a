//! `config_clh.toml`: Cloud Hypervisor.

use serde::Deserialize;

use super::{Common, File, Task, Translation, Virtiofsd, file};
use crate::config::{Config, HypervisorKind};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Clh {
    path: Option<String>,
    vcpus: Option<u32>,
    memory_in_mb: Option<u64>,
    kernel_path: Option<String>,
    image_path: Option<String>,
    initrd_path: Option<String>,
    kernel_params: Option<String>,
    firmware: Option<String>,
    hugepages: bool,
    entropy_source: Option<String>,
    enable_mem_prealloc: bool,
    debug: bool,
    task: Task,
    virtiofsd: Virtiofsd,
}

pub(super) fn config(file_: File<Clh>) -> Config {
    let clh = file_.hypervisor;
    let common = Common {
        vcpus: clh.vcpus,
        memory_in_mb: clh.memory_in_mb,
        kernel_path: clh.kernel_path,
        initrd_path: clh.initrd_path,
        kernel_params: clh.kernel_params,
        debug: clh.debug,
    };
    let mut translation = Translation::new(file_.sandbox, common);
    let hypervisor = &mut translation.config.hypervisor;
    hypervisor.kind = HypervisorKind::CloudHypervisor;
    let table = &mut hypervisor.cloud_hypervisor;
    if let Some(path) = file(clh.path) {
        table.path = path;
    }
    if let Some(source) = file(clh.entropy_source) {
        table.entropy_source = source;
    }
    table.image = file(clh.image_path);
    table.hugepages = clh.hugepages;
    table.prealloc = clh.enable_mem_prealloc;
    table.verbose = clh.debug;
    translation.no_effect(
        file(clh.firmware).is_some(),
        "hypervisor.firmware",
        "the kernel is booted directly",
    );
    translation.task(&clh.task);
    translation.virtiofsd("hypervisor.virtiofsd", &clh.virtiofsd);
    translation.config
}
