//! The adapter against the command line and the protocol it was written for.

mod line;
mod peer;

use std::time::Duration;

use devices::virtio::fs::CachePolicy;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_core::vm::{Disk, VmSize};

use self::line::Devices;
use self::peer::Peer;
use super::*;
use crate::hypervisor::{GuestEnd, GuestVsock, Layout};
use crate::qmp::Qmp;

const LIMIT: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

fn spec(dir: &std::path::Path) -> MachineSpec {
    MachineSpec {
        name: "pod".to_owned(),
        vcpus: 1,
        memory_bytes: 128 * MIB,
        kernel: "/guest/vmlinux".into(),
        initramfs: Some("/guest/initramfs".into()),
        cmdline: "task.log_level=warn".to_owned(),
        dir: dir.to_owned(),
        share: dir.join("share"),
        share_tag: "share".to_owned(),
        share_workers: 1,
        share_cache: CachePolicy::Auto,
        console_cap_bytes: 64 << 10,
        net_slots: 2,
        disk_slots: 12,
        balloon: true,
        control_port: 1024,
        most: VmSize {
            vcpus: 3,
            memory_bytes: 128 * MIB,
        },
        api_limit: LIMIT,
        outlives_daemon: false,
    }
}

fn nic(slot: usize, queues: usize) -> Nic {
    let queue = || std::io::pipe().unwrap().0.into();
    let queues = (0..queues).map(|_| queue()).collect();
    Nic { slot, queues }
}

fn disk(direct: bool) -> Disk {
    Disk {
        path: "/disk.img".into(),
        read_only: false,
        direct,
        serial: "kua0".to_owned(),
    }
}

/// A claim, of a device that is none.
fn vsock() -> GuestCid {
    let device = std::io::pipe().unwrap().0.into();
    GuestCid {
        cid: 70_000,
        device,
    }
}

fn launched(config: &StratoConfig, spec: &MachineSpec, opened: Opened) -> (Launch, Devices) {
    let launch = command::launch(config, &["soft".to_owned()], spec, opened);
    let inherited: Vec<i32> = launch.fds.iter().map(|(_, number)| *number).collect();
    let devices = Devices::of(&launch.args, &inherited);
    (launch, devices)
}

fn value<'a>(launch: &'a Launch, option: &str) -> &'a str {
    let mut args = launch.args.iter();
    args.find(|arg| *arg == option).unwrap();
    args.next().unwrap()
}

#[test]
fn command_lines_are_what_stratovirt_takes() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let plain = StratoConfig {
            machine,
            ..StratoConfig::default()
        };
        let opened = Opened {
            kernel: Some(std::io::pipe().unwrap().0.into()),
            vsock: Some(vsock()),
            nics: vec![nic(0, 2), nic(1, 1)],
        };
        let (launch, devices) = launched(&plain, &spec, opened);
        assert_eq!(launch.vsock, GuestVsock::Kernels(70_000));
        assert!(value(&launch, "-append").contains("task.control_port=70000"));
        assert!(value(&launch, "-append").contains(" soft "));
        let pci = machine == MachineType::Q35;
        assert_eq!(devices.ports.len(), if pci { 14 } else { 0 });
        // A microvm's cards have one queue.
        assert_eq!(launch.fds.len(), if pci { 5 } else { 4 });
        let full = StratoConfig {
            machine_options: "dump-guest-core=off".to_owned(),
            prealloc: true,
            memory_path: Some("/huge".into()),
            firmware: Some("/fw".into()),
            image: Some("/image".into()),
            seccomp: false,
            ..plain
        };
        let (launch, _) = launched(&full, &spec, Opened::default());
        assert!(value(&launch, "-append").contains("root=/dev/vda"));
        assert!(!value(&launch, "-append").contains("control_port"));
        assert!(value(&launch, "-machine").ends_with("dump-guest-core=off"));
        assert_eq!(launch.args.iter().any(|arg| arg.contains("pflash")), pci);
    }
}

struct Case {
    spec: MachineSpec,
    peer: Peer,
    _dir: TempDir,
}

/// A VMM with a card.
fn case() -> Case {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let opened = Opened {
        nics: vec![nic(0, 1)],
        ..Opened::default()
    };
    let (_, devices) = launched(&StratoConfig::default(), &spec, opened);
    Case {
        peer: Peer::start(&Layout::new(dir.path()), devices),
        spec,
        _dir: dir,
    }
}

impl Case {
    async fn connect(&self, running: bool) -> StratoControl {
        let started = Started {
            pid: std::process::id(),
            running,
            nics: Vec::new(),
        };
        StratoControl::connect(&self.spec, started).await.unwrap()
    }
}

#[tokio::test]
async fn every_command_is_one_that_it_has_and_places_are_given_back() {
    let case = case();
    let vm = case.connect(false).await;
    vm.pause().await.unwrap();
    vm.pause().await.unwrap_err();
    vm.resume().await.unwrap();
    vm.detach_nic(0, LIMIT).await.unwrap();
    vm.attach_nic(nic(0, 2)).await.unwrap();
    vm.attach_nic(nic(1, 1)).await.unwrap();
    // More often than there are places.
    for turn in 0..30 {
        let slot = turn % 12;
        vm.attach_disk(slot, disk(turn % 2 == 0)).await.unwrap();
        vm.detach_disk(slot, LIMIT).await.unwrap();
    }
    vm.attach_disk(11, disk(true)).await.unwrap();
    let plugged = case.peer.plugged();
    let plugged: Vec<_> = plugged
        .iter()
        .map(|(port, id)| (port.as_str(), id.as_str()))
        .collect();
    assert_eq!(
        plugged,
        [("rp0", "nic0"), ("rp1", "nic1"), ("rp13", "disk11")]
    );
}

#[tokio::test]
async fn what_is_refused_leaves_nothing_and_can_be_tried_again() {
    let case = case();
    let vm = case.connect(false).await;
    vm.attach_disk(0, disk(true)).await.unwrap();
    let before = case.peer.plugged();
    vm.attach_disk(0, disk(true)).await.unwrap_err();
    vm.attach_nic(nic(0, 1)).await.unwrap_err();
    // There is no such port.
    vm.attach_disk(12, disk(true)).await.unwrap_err();
    vm.attach_nic(nic(20, 1)).await.unwrap_err();
    assert_eq!(case.peer.plugged(), before);
    vm.detach_disk(0, LIMIT).await.unwrap();
    vm.detach_disk(0, LIMIT).await.unwrap_err();
    vm.attach_disk(0, disk(true)).await.unwrap();
}

#[tokio::test]
async fn a_later_daemon_goes_on() {
    let case = case();
    let vm = case.connect(false).await;
    vm.attach_disk(3, disk(true)).await.unwrap();
    drop(vm);
    let vm = case.connect(true).await;
    vm.detach_disk(3, LIMIT).await.unwrap();
    vm.detach_nic(0, LIMIT).await.unwrap();
    assert!(case.peer.plugged().is_empty());
}

#[tokio::test]
async fn a_guest_that_resets_is_not_booted_again() {
    let case = case();
    let vm = case.connect(false).await;
    case.peer.reset();
    let ended = || case.peer.commands().contains(&"quit".to_owned());
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
    let case = case();
    let api = Layout::new(&case.spec.dir).api();
    let qmp = Qmp::connect(NAME, &api, LIMIT, |_| {}).await.unwrap();
    let device = |more: Value| {
        let mut device = json!({"id": "x", "driver": "virtio-blk-pci", "drive": "y"});
        let object = device.as_object_mut().unwrap();
        object.extend(more.as_object().unwrap().clone());
        device
    };
    for (command, arguments, why) in [
        ("query-pci", json!({}), "unknown variant"),
        ("stop", json!({"now": true}), "unknown field `now`"),
        ("cont", json!({}), ""),
        ("getfd", json!({"fdname": "x"}), "Invalid SCM"),
        (
            "device_add",
            device(json!({"romfile": ""})),
            "unknown field `romfile`",
        ),
        (
            "device_add",
            device(json!({"bus": "rp1", "addr": "0x0"})),
            "no backend",
        ),
        ("device_del", json!({"id": "x"}), "not found"),
        ("blockdev-del", json!({"node-name": "x"}), "not found"),
        (
            "netdev_add",
            json!({"id": "n", "type": "tap", "fds": "x"}),
            "no fd x",
        ),
    ] {
        let error = qmp.execute(command, arguments).await.unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("refuses") && error.contains(why),
            "{command}: {error}"
        );
    }
    assert_eq!(case.peer.commands(), ["qmp_capabilities"]);
}

#[test]
fn without_vsock_of_the_host_the_error_names_it() {
    if std::path::Path::new("/dev/vhost-vsock").exists() {
        println!("skipped: this host has vhost-vsock");
        return;
    }
    let error = GuestCid::claim().unwrap_err().to_string();
    assert!(
        error.contains("stratovirt needs /dev/vhost-vsock"),
        "{error}"
    );
    assert!(error.contains("modprobe vhost_vsock"), "{error}");
}
