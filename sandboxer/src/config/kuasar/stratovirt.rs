//! `config_stratovirt_*.toml`: StratoVirt.

use external_hv::stratovirt::MachineType;
use serde::Deserialize;

use super::{Common, File, Translation, Virtiofsd, file};
use crate::config::{Config, HypervisorKind};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StratoVirt {
    path: Option<String>,
    machine_type: Option<String>,
    vcpus: Option<u32>,
    memory_in_mb: Option<u64>,
    kernel_path: Option<String>,
    image_path: Option<String>,
    initrd_path: Option<String>,
    kernel_params: Option<String>,
    firmware: Option<String>,
    block_device_driver: Option<String>,
    enable_mem_prealloc: bool,
    debug: bool,
    virtiofsd_conf: Virtiofsd,
}

pub(super) fn config(file_: File<StratoVirt>) -> Config {
    let strato = file_.hypervisor;
    let common = Common {
        vcpus: strato.vcpus,
        memory_in_mb: strato.memory_in_mb,
        kernel_path: strato.kernel_path,
        initrd_path: strato.initrd_path,
        kernel_params: strato.kernel_params,
        debug: strato.debug,
    };
    let mut translation = Translation::new(file_.sandbox, common);
    let hypervisor = &mut translation.config.hypervisor;
    hypervisor.kind = HypervisorKind::StratoVirt;
    let table = &mut hypervisor.stratovirt;
    if let Some(path) = file(strato.path) {
        table.path = path;
    }
    table.image = file(strato.image_path);
    table.prealloc = strato.enable_mem_prealloc;
    let machine = strato.machine_type.unwrap_or_default();
    let mut options = machine.split(',');
    let board = options.next().unwrap_or_default();
    let known = match board {
        "q35" | "" => Some(MachineType::Q35),
        "microvm" => Some(MachineType::Microvm),
        _ => None,
    };
    table.machine = known.unwrap_or_default();
    // Memory is always shared: our devices have to see it.
    let (sharing, options): (Vec<&str>, Vec<&str>) =
        options.partition(|option| option.starts_with("mem-share="));
    table.machine_options = options.join(",");
    let firmware = file(strato.firmware);
    let has_firmware = firmware.is_some();
    let direct = table.machine == MachineType::Microvm;
    table.firmware = firmware.filter(|_| !direct);
    for (set, key, why) in [
        (
            known.is_none(),
            "machine_type",
            format!("{board:?} is no board that is known; \"q35\" is used"),
        ),
        (
            sharing.contains(&"mem-share=off"),
            "machine_type",
            "mem-share has to be on".to_owned(),
        ),
        (
            direct && has_firmware,
            "firmware",
            "a microvm has none".to_owned(),
        ),
        (
            strato
                .block_device_driver
                .is_some_and(|driver| driver != "virtio-blk"),
            "block_device_driver",
            "disks are virtio-blk".to_owned(),
        ),
    ] {
        translation.no_effect(set, &format!("hypervisor.{key}"), &why);
    }
    translation.virtiofsd("hypervisor.virtiofsd_conf", &strato.virtiofsd_conf);
    translation.config
}
