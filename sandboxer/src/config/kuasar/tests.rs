use std::path::Path;

use external_hv::qemu::MachineType;
use external_hv::stratovirt;

use super::super::{Config, ConfigError, FsCache, HypervisorKind, Mode};

const CLH: &str = include_str!("../../../../dist/kuasar/config_clh.toml");
const QEMU: &str = include_str!("../../../../dist/kuasar/config_qemu_x86_64.toml");
const STRATOVIRT: &str = include_str!("../../../../dist/kuasar/config_stratovirt_x86_64.toml");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/k.toml"))
}

#[test]
fn kuasar_files_select_the_external_mode() {
    let clh = parse(CLH).unwrap();
    assert_eq!(clh.sandbox.mode, Mode::External);
    assert_eq!(clh.hypervisor.kind, HypervisorKind::CloudHypervisor);
    assert_eq!(clh.vm.memory.as_u64(), 1 << 30);
    assert_eq!(clh.fs.workers, 4);
    assert_eq!(clh.fs.cache, FsCache::Never);
    let qemu = parse(QEMU).unwrap();
    assert_eq!(qemu.sandbox.mode, Mode::External);
    assert_eq!(qemu.hypervisor.kind, HypervisorKind::Qemu);
    assert_eq!(qemu.hypervisor.qemu.machine, MachineType::Pc);
    assert_eq!(qemu.vm.memory.as_u64(), 2 << 30);
    let strato = parse(STRATOVIRT).unwrap();
    assert_eq!(strato.sandbox.mode, Mode::External);
    assert_eq!(strato.hypervisor.kind, HypervisorKind::StratoVirt);
    let table = &strato.hypervisor.stratovirt;
    assert_eq!(table.machine, stratovirt::MachineType::Q35);
    assert_eq!(table.machine_options, "", "mem-share is ours to say");
    assert!(table.firmware.is_some());
    assert_eq!(strato.vm.memory.as_u64(), 1 << 30);
}

#[test]
fn boards_of_stratovirt_are_told_apart_and_the_rest_warns() {
    let strato = |rest: &str| parse(&format!("[hypervisor]\npath = '/x/strato'\n{rest}")).unwrap();
    let microvm = strato("machine_type = 'microvm,dump-guest-core=off'\nfirmware = '/fw'");
    let table = &microvm.hypervisor.stratovirt;
    assert_eq!(table.machine, stratovirt::MachineType::Microvm);
    assert_eq!(table.machine_options, "dump-guest-core=off");
    assert_eq!(table.firmware, None);
    assert!(microvm.warnings[0].contains("hypervisor.firmware"));
    for (machine, why) in [
        ("virt", "\"virt\" is no board"),
        ("q35,mem-share=off", "mem-share has to be on"),
    ] {
        let config = strato(&format!("machine_type = '{machine}'"));
        assert_eq!(config.hypervisor.kind, HypervisorKind::StratoVirt);
        assert!(config.warnings[0].contains(why), "{:?}", config.warnings);
    }
}

/// Every key of the files changes what is launched, or says that it does not.
#[test]
fn every_key_changes_the_configuration_or_warns() {
    for text in [CLH, QEMU, STRATOVIRT] {
        let selects = match text {
            CLH => "path = 'x'",
            QEMU => "qemu_path = 'x'",
            _ => "path = '/x/stratovirt'",
        };
        let base = parse(&format!("[hypervisor]\n{selects}")).unwrap();
        let document: toml::Table = text.parse().unwrap();
        let hypervisor = document["hypervisor"].as_table().unwrap();
        let mut keys: Vec<(String, String)> = Vec::new();
        for (key, value) in hypervisor {
            match value.as_table() {
                None => keys.push((String::new(), key.clone())),
                Some(table) => keys.extend(table.keys().map(|k| (format!(".{key}"), k.clone()))),
            }
        }
        for (table, key) in keys {
            let value = match (table.as_str(), key.as_str()) {
                (_, "vcpus" | "default_max_vcpus" | "mem_slots" | "default_bridges") => "7",
                (_, "memory_in_mb") => "777",
                (_, "mem_offset" | "msize_9p" | "virtiofs_cache_size") => "4096",
                (_, "thread_pool_size") => "9",
                (_, "cache" | "virtiofs_cache") => "'always'",
                (_, "machine_type") if text == STRATOVIRT => "'microvm'",
                (_, "machine_type") => "'q35'",
                (_, "share_fs") => "'Virtio9P'",
                (_, "block_device_driver") => "'VirtioScsi'",
                (_, "disable_nvdimm" | "use_vsock") => "false",
                (_, "virtiofs_extra_args") => "['--x']",
                (_, "syslog" | "debug" | "hugepages" | "enable_mem_prealloc" | "mem_prealloc") => {
                    "true"
                }
                (_, key) if key.starts_with("enable_") || key.ends_with("direct_io") => "true",
                _ => "'/other'",
            };
            let value = match (text, key.as_str()) {
                (STRATOVIRT, "path") if table.is_empty() => "'/other/stratovirt'",
                _ => value,
            };
            let own = table.is_empty() && selects.starts_with(&format!("{key} ="));
            let selects = if own { "" } else { selects };
            let changed = format!("[hypervisor]\n{selects}\n[hypervisor{table}]\n{key} = {value}");
            let changed = if table.is_empty() {
                format!("[hypervisor]\n{selects}\n{key} = {value}")
            } else {
                changed
            };
            let changed = parse(&changed).unwrap_or_else(|e| panic!("{table}.{key}: {e}"));
            assert_ne!(changed, base, "hypervisor{table}.{key} does nothing");
        }
    }
}

#[test]
fn unknown_keys_name_the_nearest() {
    let wrong = parse("[hypervisor]\npath = 'x'\nmemory_in_bm = 5").unwrap_err();
    assert_eq!(
        wrong.to_string(),
        "/k.toml: unknown key `hypervisor.memory_in_bm`; did you mean `hypervisor.memory_in_mb`?"
    );
    let wrong = parse("[hypervisor]\nqemu_path = 'x'\n[hypervisor.virtiofsd]\ncahce = 'a'");
    assert!(
        wrong
            .unwrap_err()
            .to_string()
            .contains("hypervisor.virtiofsd.cache")
    );
}
