use serde_json::{Value, json};

use super::{ChConfig, PAYLOAD_SINCE};
use crate::hypervisor::{Layout, MEMORY_STEP_BYTES, MachineSpec};

/// What our file system device has in each queue.
const FS_QUEUE_SIZE: u16 = 128;
/// Address of every guest; nothing is routed by it.
const GUEST_CID: u32 = 3;

/// The VM for `vm.create`, as release `release` describes it.
pub(super) fn vm(
    config: &ChConfig,
    release: u32,
    parameters: &[String],
    spec: &MachineSpec,
) -> Value {
    let layout = Layout::new(&spec.dir);
    let mut memory = json!({
        "size": spec.memory_bytes, "shared": true, "hugepages": config.hugepages,
        "prefault": config.prealloc,
    });
    let hotplug = spec.most.memory_bytes.saturating_sub(spec.memory_bytes);
    if hotplug > 0 {
        let hotplug = hotplug.next_multiple_of(MEMORY_STEP_BYTES);
        set(&mut memory, "hotplug_size", hotplug.into());
    }
    let mut vm = json!({
        "cpus": { "boot_vcpus": spec.vcpus, "max_vcpus": spec.most.vcpus },
        "memory": memory,
        "rng": { "src": config.entropy_source },
        "fs": [{
            "id": "share", "tag": spec.share_tag, "socket": layout.fs(),
            "num_queues": 1, "queue_size": FS_QUEUE_SIZE,
        }],
        "vsock": { "id": "vsock", "cid": GUEST_CID, "socket": layout.vsock() },
        // On stdout, which the supervisor reads.
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    });
    if spec.balloon {
        let balloon = json!({ "size": 0, "deflate_on_oom": true, "free_page_reporting": true });
        set(&mut vm, "balloon", balloon);
    }
    if let Some(image) = &config.image {
        let pmem = json!([{ "id": "rootfs", "file": image, "discard_writes": true }]);
        set(&mut vm, "pmem", pmem);
    }
    boot(
        &mut vm,
        release,
        &command_line(config, parameters, spec),
        spec,
    );
    vm
}

fn boot(vm: &mut Value, release: u32, cmdline: &str, spec: &MachineSpec) {
    if release >= PAYLOAD_SINCE {
        let mut payload = json!({ "kernel": spec.kernel, "cmdline": cmdline });
        if let Some(initramfs) = &spec.initramfs {
            set(&mut payload, "initramfs", json!(initramfs));
        }
        set(vm, "payload", payload);
        return;
    }
    set(vm, "kernel", json!({ "path": spec.kernel }));
    set(vm, "cmdline", json!({ "args": cmdline }));
    if let Some(initramfs) = &spec.initramfs {
        set(vm, "initramfs", json!({ "path": initramfs }));
    }
}

fn set(object: &mut Value, key: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(key.to_owned(), value);
    }
}

fn command_line(config: &ChConfig, parameters: &[String], spec: &MachineSpec) -> String {
    let mut words: Vec<String> = ["console=ttyS0", "reboot=k", "panic=-1"]
        .map(str::to_owned)
        .into();
    words.extend(parameters.iter().cloned());
    if config.image.is_some() {
        words.push("root=/dev/pmem0p1 ro rootfstype=ext4".to_owned());
    }
    if !spec.cmdline.trim().is_empty() {
        words.push(spec.cmdline.trim().to_owned());
    }
    words.join(" ")
}
