//! One suite over every implementation of `Vm`: what a pod relies on, whoever runs it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::TapDevice;
use external_hv::capability::{Backend, Capability};
use harness::{QEMU, bin_dir, eventually, kvm_missing, skip_if};
use sandboxer::backend::external::ExternalBackend;
use sandboxer::backend::vmm::VmmBackend;
use sandboxer::backend::{MachineRequest, SandboxBackend};
use sandboxer::config::Config;
use tempfile::TempDir;
use vmm_core::vm::{ExitReason, Vm, VmError};

/// For what happens at once, also on slow hosts.
const LIMIT: Duration = Duration::from_secs(60);
/// For a guest that boots.
const BOOT: Duration = Duration::from_secs(300);
const MEMORY: u64 = 128 << 20;
/// A port where nobody listens.
const NOBODY: u32 = 9;

fn config(text: &str) -> Config {
    Config::parse(text, Path::new("conformance.toml")).unwrap()
}

async fn build(backend: &dyn SandboxBackend, dir: &TempDir) -> Arc<dyn Vm> {
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let request = MachineRequest {
        pod: "conformance".to_owned(),
        vcpus: 1,
        memory_bytes: MEMORY,
        share,
        dir: dir.path().to_owned(),
        limits: None,
        disks: Vec::new(),
        netns: None,
    };
    backend.build(request).await.unwrap().vm
}

/// Whether an operation did what the table says: worked, or is typed as unsupported.
fn check<T: std::fmt::Debug>(kind: Backend, what: Capability, result: &Result<T, VmError>) {
    match (kind.can(what), result) {
        (true, Ok(_)) | (false, Err(VmError::Unsupported { .. })) => {}
        (can, other) => panic!("{kind:?}, {what:?}: the table says {can}, and it is {other:?}"),
    }
}

async fn conforms(backend: &dyn SandboxBackend, kind: Backend) {
    let dir = tempfile::Builder::new()
        .prefix("kuasar-vm-")
        .tempdir()
        .unwrap();
    let vm = build(backend, &dir).await;
    assert!(vm.exited().borrow().is_none());
    assert_eq!(vm.stats().memory_bytes, MEMORY);

    // The guest dials; a port has one listener.
    let mut control = vm.listen(agent_api::CONTROL_PORT).unwrap();
    assert!(matches!(
        vm.listen(agent_api::CONTROL_PORT),
        Err(VmError::Io { .. })
    ));
    vm.start().await.unwrap();
    let dialled = tokio::time::timeout(BOOT, control.accept()).await;
    let agent = dialled.expect("the agent dials").expect("a stream");

    // The host dials.
    drop(vm.connect(agent_api::STREAM_PORT, LIMIT).await.unwrap());
    let refused = vm.connect(NOBODY, LIMIT).await.map(drop);
    assert!(
        matches!(refused, Err(VmError::Refused(NOBODY))),
        "{refused:?}"
    );

    // It is where it says.
    let threads = vm.vcpu_threads();
    assert_eq!(threads.len(), 1, "{threads:?}");
    for thread in threads {
        let task = format!("/proc/{}/task/{thread}", vm.pid());
        assert!(Path::new(&task).exists(), "{task}");
    }

    check(kind, Capability::Pause, &vm.pause().await);
    let still = vm
        .connect(NOBODY, Duration::from_millis(500))
        .await
        .map(drop);
    assert!(matches!(still, Err(VmError::Deadline { .. })), "{still:?}");
    check(kind, Capability::Pause, &vm.resume().await);
    drop(vm.connect(agent_api::STREAM_PORT, LIMIT).await.unwrap());

    network(vm.as_ref(), kind).await;
    if !kind.can(Capability::Snapshot) {
        let to = dir.path().join("snapshot");
        std::fs::create_dir(&to).unwrap();
        check(
            kind,
            Capability::Snapshot,
            &vm.snapshot(&to, "x", None).await,
        );
    }

    // The end: once, idempotent, and nothing works any more.
    let vmm = vm.pid();
    vm.stop(LIMIT).await.unwrap();
    vm.stop(LIMIT).await.unwrap();
    assert_eq!(*vm.exited().borrow(), Some(ExitReason::Stopped));
    assert!(control.accept().await.is_none());
    for result in [
        vm.start().await,
        vm.pause().await,
        vm.resume().await,
        vm.connect(NOBODY, LIMIT).await.map(drop),
        vm.listen(NOBODY).map(drop),
    ] {
        assert!(matches!(result, Err(VmError::Exited(_))), "{result:?}");
    }
    drop(agent);
    drop(vm);
    if vmm != std::process::id() {
        eventually("the end of the VMM", LIMIT, || {
            (!Path::new(&format!("/proc/{vmm}")).exists()).then_some(())
        });
    }
}

async fn network(vm: &dyn Vm, kind: Backend) {
    let tap = |name: &str| TapDevice::open(name, 1);
    let Ok(first) = tap("tapconf%d") else {
        println!("skipped: no taps can be made here");
        return;
    };
    let slots = vm.net_slots();
    let beyond = vm.attach_nic(slots, first).await;
    assert!(
        matches!(beyond, Err(VmError::NoNetSlot { .. })),
        "{beyond:?}"
    );
    let plugged = vm.attach_nic(0, tap("tapconf%d").unwrap()).await;
    check(kind, Capability::NetworkHotplug, &plugged);
    if plugged.is_ok() {
        vm.detach_nic(0, LIMIT).await.unwrap();
        // The place is free again.
        vm.attach_nic(0, tap("tapconf%d").unwrap()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    skip_if!(kvm_missing());
    let backend = VmmBackend::new(&config("[templates]\nwarm = 0\nshells = 0\n"))
        .await
        .unwrap();
    conforms(&backend, Backend::InProcess).await;
}

async fn qemu(more: &str, kind: Backend) {
    skip_if!((!Path::new(QEMU).exists()).then_some("QEMU is not installed"));
    let supervisor = bin_dir().join(external_hv::supervisor::PROGRAM);
    let text = format!(
        "[sandbox]\nmode = \"external\"\n[hypervisor]\nsupervisor = {supervisor:?}\n\
         [hypervisor.qemu]\n{more}"
    );
    let backend = ExternalBackend::new(&config(&text), false).await.unwrap();
    conforms(&backend, kind).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_with_pci() {
    qemu("accel = \"tcg\"\n", Backend::Qemu).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_microvm_on_kvm() {
    skip_if!(kvm_missing());
    // Where KVM emulates guest kernels, finding the devices of PCI takes two minutes.
    let text = "machine = \"microvm\"\naccel = \"kvm\"\n";
    qemu(text, Backend::QemuMicrovm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_microvm() {
    let text = "machine = \"microvm\"\naccel = \"tcg\"\n";
    qemu(text, Backend::QemuMicrovm).await;
}
