//! The adapter against the API it was written for. Guests boot in `make test-external`.

mod peer;

use std::time::Duration;

use devices::virtio::fs::CachePolicy;
use serde_json::json;
use tempfile::TempDir;

use self::peer::Peer;
use super::api::Api;
use super::control::ChControl;
use super::*;
use crate::hypervisor::GuestEnd;
use vmm_core::vm::{Disk, VmSize};

const LIMIT: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

#[test]
fn releases_are_told_apart() {
    assert_eq!(release("cloud-hypervisor v48.0.0\n"), Some(48));
    assert_eq!(release("cloud-hypervisor v51.1-3-gdeadbee"), Some(51));
    assert_eq!(release("cloud-hypervisor 0.15.0"), Some(0));
    assert_eq!(release("QEMU emulator version 7.2"), None);
    assert_eq!(release(""), None);
}

struct Case {
    spec: MachineSpec,
    release: u32,
    peer: Peer,
    _dir: TempDir,
}

fn case(release: u32) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let spec = MachineSpec {
        name: "pod".to_owned(),
        vcpus: 1,
        memory_bytes: 128 * MIB,
        kernel: "/guest/vmlinux".into(),
        initramfs: Some("/guest/initramfs".into()),
        cmdline: "task.log_level=warn".to_owned(),
        dir: dir.path().to_owned(),
        share: dir.path().join("share"),
        share_tag: "share".to_owned(),
        share_workers: 1,
        share_cache: CachePolicy::Auto,
        console_cap_bytes: 64 << 10,
        net_slots: 2,
        disk_slots: 2,
        balloon: true,
        control_port: 1024,
        most: VmSize {
            vcpus: 4,
            // No multiple of what is plugged at once.
            memory_bytes: 500 * MIB,
        },
        api_limit: LIMIT,
        outlives_daemon: true,
    };
    Case {
        peer: Peer::start(&Layout::new(dir.path()), release),
        release,
        spec,
        _dir: dir,
    }
}

impl Case {
    async fn connect(&self, running: bool, nics: Vec<Nic>) -> Result<ChControl, VmError> {
        let vm = config::vm(&ChConfig::default(), self.release, &[], &self.spec);
        let pid = std::process::id();
        let started = Started { pid, running, nics };
        ChControl::connect(&self.spec, self.release, vm, started).await
    }

    fn api(&self) -> Api {
        Api::new(&Layout::new(&self.spec.dir).api(), LIMIT)
    }
}

fn nic(slot: usize, queues: usize) -> Nic {
    let queue = || std::io::pipe().unwrap().0.into();
    let queues = (0..queues).map(|_| queue()).collect();
    Nic { slot, queues }
}

fn disk() -> Disk {
    Disk {
        path: "/disk.img".into(),
        read_only: false,
        direct: true,
        serial: "kua0".to_owned(),
    }
}

#[tokio::test]
async fn every_call_is_one_that_the_api_has() {
    for release in [PAYLOAD_SINCE - 1, PAYLOAD_SINCE, DISK_FORMAT_SINCE, 53] {
        let case = case(release);
        let vm = case.connect(false, vec![nic(0, 1)]).await.unwrap();
        vm.attach_nic(nic(1, 2)).await.unwrap();
        vm.detach_nic(0, LIMIT).await.unwrap();
        vm.attach_nic(nic(0, 1)).await.unwrap();
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        let size = VmSize {
            vcpus: 3,
            memory_bytes: 300 * MIB,
        };
        vm.resize(size).await.unwrap();
        let grown = vm.size().await.unwrap();
        assert_eq!((grown.vcpus, grown.memory_bytes), (3, 384 * MIB));
        // Within what was set aside, however it is rounded.
        vm.resize(VmSize {
            vcpus: 1,
            ..case.spec.most
        })
        .await
        .unwrap();
        let grown = vm.size().await.unwrap();
        assert_eq!((grown.vcpus, grown.memory_bytes), (3, 512 * MIB));
        #[rustfmt::skip]
        let mut calls = vec![
            "vmm.ping", "vm.create", "vm.add-net", "vm.boot",
            "vm.add-net", "vm.remove-device", "vm.add-net", "vm.pause", "vm.resume",
            "vm.info", "vm.resize", "vm.info", "vm.info", "vm.resize", "vm.info",
        ];
        if release < DISK_FORMAT_SINCE {
            let error = vm.attach_disk(0, disk()).await.unwrap_err().to_string();
            assert!(error.contains("use release 51 or later"), "{error}");
        } else {
            vm.attach_disk(0, disk()).await.unwrap();
            vm.detach_disk(0, LIMIT).await.unwrap();
            vm.attach_disk(0, disk()).await.unwrap();
            calls.extend(["vm.add-disk", "vm.remove-device", "vm.add-disk"]);
        }
        assert_eq!(case.peer.calls(), calls);
    }
}

#[tokio::test]
async fn a_later_daemon_only_asks_and_goes_on() {
    let case = case(53);
    drop(case.connect(false, vec![nic(0, 1)]).await.unwrap());
    let before = case.peer.calls().len();
    let vm = case.connect(true, Vec::new()).await.unwrap();
    assert_eq!(case.peer.calls()[before..], ["vmm.ping", "vm.info"]);
    vm.detach_nic(0, LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_resets_is_not_booted_again() {
    let case = case(53);
    let vm = case.connect(false, Vec::new()).await.unwrap();
    case.peer.tell("vm", "rebooting", &json!(null));
    let ended = || case.peer.calls().contains(&"vmm.shutdown".to_owned());
    let waiting = async {
        while !ended() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.unwrap();
    assert_eq!(vm.guest_end(), Some(GuestEnd::Reset));
}

#[tokio::test]
async fn the_peer_is_strict() {
    let case = case(53);
    let api = case.api();
    let refused = |result: Result<serde_json::Value, HvError>, why: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(api.act("vm.boot").await, "NoVm");
    refused(api.get("vm.info").await, "NoVm");
    refused(api.get("vm.boot").await, "is no GET");
    refused(api.put("vm.start", json!({})).await, "404");
    let vm = |release| config::vm(&ChConfig::default(), release, &[], &case.spec);
    refused(
        api.put("vm.create", vm(PAYLOAD_SINCE - 1)).await,
        "what to boot",
    );
    let mut unknown = vm(53);
    unknown["memory"]["sized"] = 1.into();
    refused(api.put("vm.create", unknown).await, "unknown field `sized`");
    api.put("vm.create", vm(53)).await.unwrap();
    refused(api.put("vm.create", vm(53)).await, "Created");
    let card = json!({"id": "nic0", "mac": "02:00:00:00:00:01", "num_queues": 4});
    let queues = || nic(0, 1).queues;
    refused(
        api.put_with("vm.add-net", card.clone(), queues()).await,
        "4 queues with 1",
    );
    refused(
        api.put_with("vm.boot", json!({}), queues()).await,
        "has a body",
    );
    refused(
        api.put_with("vm.resize", json!({"desired_vcpus": 2}), queues())
            .await,
        "no fds",
    );
    api.act("vm.boot").await.unwrap();
    refused(
        api.put("vm.remove-device", json!({"id": "nic9"})).await,
        "no device nic9",
    );
    refused(
        api.put(
            "vm.resize",
            json!({"desired_vcpus": 1, "desired_ram": 129 * MIB}),
        )
        .await,
        "desired_ram",
    );
    assert_eq!(case.peer.calls(), ["vm.create", "vm.boot"]);
}
