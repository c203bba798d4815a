use std::path::Path;

use external_hv::qemu::MachineType;

use super::super::{Config, ConfigError, FsCache, HypervisorKind, Mode};

const CLH: &str = include_str!("../../../../dist/kuasar/config_clh.toml");
const QEMU: &str = include_str!("../../../../dist/kuasar/config_qemu_x86_64.toml");

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
}

/// Every key of both files changes what is launched, or says that it does not.
#[test]
fn every_key_changes_the_configuration_or_warns() {
    for text in [CLH, QEMU] {
        let selects = if text == CLH {
            "path = 'x'"
        } else {
            "qemu_path = 'x'"
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

#[test]
fn stratovirt_is_told_to_be_missing() {
    let wrong = parse("[hypervisor]\npath = '/usr/bin/stratovirt'").unwrap_err();
    assert!(wrong.to_string().contains("StratoVirt is not supported"));
}
