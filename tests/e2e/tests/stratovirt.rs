//! StratoVirt itself, on hosts without vhost-vsock too: what its adapter does with a guest that
//! has no agent, and tells what it sees through its share.
//!
//! For `make test-external HV=stratovirt BIN=...`.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::fs::CachePolicy;
use devices::virtio::net::TapDevice;
use external_hv::stratovirt::{MachineType, StratoConfig, StratoVirt};
use external_hv::{ExternalVm, MachineSpec};
use guest_image::{Cache, GuestImage, Initramfs};
use harness::{STRATOVIRT, bin_dir, eventually, external_backend, skip_if};
use tempfile::TempDir;
use vmm_core::Host;
use vmm_core::vm::{Disk, ExitReason, Vm, VmError, VmSize};

/// Guest kernels may be emulated, PCI and all.
const SLOW: Duration = Duration::from_secs(300);
const MEMORY: u64 = 128 << 20;
const BUSYBOX: &str = "/bin/busybox";

/// Writes what it sees, over and over; what starts no program is quick on slow hosts.
const SCRIPT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /share
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t virtiofs share /share
turn=0
while :; do
	turn=$((turn + 1))
	cd /sys/class/net; nets=$(echo *)
	disks=
	for disk in /sys/block/vd*; do
		[ -e $disk/size ] || continue
		read size < $disk/size
		[ $size != 0 ] || continue
		read serial < $disk/serial
		read word < /dev/${disk##*/}
		disks="$disks $serial=$word"
	done
	echo "turn=$turn nets=$nets disks=$disks end" > /share/state
	if [ -e /share/reset ]; then $b reboot -f; fi
	$b sleep 1
done
"#;

/// Why it cannot run here.
fn missing() -> Option<String> {
    if external_backend().as_deref() != Some("stratovirt") {
        return Some("BACKEND is not stratovirt".to_owned());
    }
    let absent = [
        program().as_path(),
        Path::new(BUSYBOX),
        Path::new("/dev/kvm"),
    ]
    .into_iter()
    .find(|path| !path.exists())?
    .to_owned();
    Some(format!("there is no {}", absent.display()))
}

fn program() -> PathBuf {
    std::env::var_os("KUASAR_HYPERVISOR_PATH").map_or_else(|| STRATOVIRT.into(), PathBuf::from)
}

struct Case {
    vm: ExternalVm,
    dir: TempDir,
}

impl Case {
    fn new(machine: MachineType) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kuasar-vm-")
            .tempdir()
            .unwrap();
        let (share, script) = (dir.path().join("share"), dir.path().join("script"));
        fs::create_dir(&share).unwrap();
        fs::write(&script, SCRIPT).unwrap();
        let cache = Cache::locate().unwrap();
        let initramfs = Initramfs::new(BUSYBOX)
            .with(BUSYBOX, "/bin/busybox", 0o755)
            .with(script, "/bin/script", 0o755);
        let spec = MachineSpec {
            name: "strato".to_owned(),
            vcpus: 1,
            memory_bytes: MEMORY,
            kernel: GuestImage::current(&cache).unwrap().kernel,
            initramfs: Some(initramfs.build(&cache).unwrap().path),
            cmdline: "rdinit=/bin/script".to_owned(),
            dir: dir.path().to_owned(),
            share,
            share_tag: "share".to_owned(),
            share_workers: 1,
            share_cache: CachePolicy::Never,
            console_cap_bytes: 64 << 10,
            net_slots: 1,
            disk_slots: 2,
            balloon: true,
            control_port: agent_api::CONTROL_PORT,
            most: VmSize {
                vcpus: 2,
                memory_bytes: MEMORY,
            },
            api_limit: Duration::from_secs(60),
            outlives_daemon: false,
        };
        let config = StratoConfig {
            path: program(),
            machine,
            ..StratoConfig::default()
        };
        let host = Host::probe().map_err(|err| err.to_string());
        let strato = StratoVirt::without_vsock(config, &host).unwrap();
        let supervisor = bin_dir().join(external_hv::supervisor::PROGRAM);
        Self {
            vm: ExternalVm::new(Arc::new(strato), spec, supervisor),
            dir,
        }
    }

    fn share(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    /// Waits until the guest sees `what`; also what it said then.
    fn sees(&self, what: &str) -> String {
        let console = || self.vm.console_tail().unwrap_or_default();
        let exited = self.vm.exited();
        eventually(what, SLOW, || {
            let end = exited.borrow().clone();
            assert!(end.is_none(), "{what}: {end:?}\n{}", console());
            let state = fs::read_to_string(self.share("state")).ok()?;
            (state.contains(what) && state.contains(" end")).then_some(state)
        })
    }

    fn disk(&self, name: &str) -> Disk {
        let path = self.dir.path().join(name);
        let mut content = format!("word-of-{name}\n").into_bytes();
        content.resize(1 << 20, 0);
        fs::write(&path, content).unwrap();
        Disk {
            path,
            read_only: false,
            direct: false,
            serial: name.to_owned(),
        }
    }

    async fn boot(&self) {
        let tap = TapDevice::open("tapstrato%d", 1);
        match tap {
            Ok(tap) => self.vm.attach_nic(0, tap).await.unwrap(),
            Err(err) => println!("skipped: no taps can be made here: {err}"),
        }
        if let Err(err) = self.vm.start().await {
            panic!("{err:?}\n{}", self.vm.console_tail().unwrap_or_default());
        }
        println!("{}", self.sees("turn=").trim());
    }

    /// Stands still, and goes on.
    async fn pauses(&self) {
        self.vm.pause().await.unwrap();
        let state = fs::read_to_string(self.share("state")).unwrap();
        fs::remove_file(self.share("state")).unwrap();
        self.vm.resume().await.unwrap();
        assert_ne!(self.sees("turn="), state);
    }

    async fn ends(self) {
        let vmm = format!("/proc/{}", self.vm.pid());
        self.vm.stop(SLOW).await.unwrap();
        assert!(!Path::new(&vmm).exists(), "{vmm} is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_q35_plugs_everything_in_and_out() {
    skip_if!(missing());
    let case = Case::new(MachineType::Q35);
    case.boot().await;
    assert_eq!(case.vm.vcpu_threads().len(), 1);
    case.pauses().await;
    for turn in 0..4 {
        let (slot, name) = (turn % 2, format!("disk{turn}"));
        let disk = case.disk(&name);
        case.vm.attach_disk(slot, disk).await.unwrap();
        case.sees(&format!("{name}=word-of-{name}"));
        case.vm.detach_disk(slot, SLOW).await.unwrap();
        println!("{}", case.sees("disks= end").trim());
    }
    let larger = VmSize {
        vcpus: 2,
        memory_bytes: MEMORY,
    };
    let refused = case.vm.resize(larger, SLOW).await;
    assert!(
        matches!(refused, Err(VmError::Unsupported { .. })),
        "{refused:?}"
    );
    if case.sees("turn=").contains("eth0") {
        case.vm.detach_nic(0, SLOW).await.unwrap();
        case.sees("nets=dummy0 lo disks");
        let tap = TapDevice::open("tapstrato%d", 1).unwrap();
        case.vm.attach_nic(0, tap).await.unwrap();
        case.sees("nets=dummy0 eth0 lo disks");
    }
    fs::write(case.share("reset"), "").unwrap();
    let mut exited = case.vm.exited();
    let end = tokio::time::timeout(SLOW, exited.wait_for(Option::is_some)).await;
    assert_eq!(*end.unwrap().unwrap(), Some(ExitReason::GuestReset));
    case.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_has_its_share_and_card_and_no_hotplug() {
    skip_if!(missing());
    let case = Case::new(MachineType::Microvm);
    case.boot().await;
    case.pauses().await;
    let refused = case.vm.attach_disk(0, case.disk("disk")).await;
    assert!(
        matches!(refused, Err(VmError::Unsupported { .. })),
        "{refused:?}"
    );
    case.ends().await;
}
