//! VMMs that fail, at each step: the real supervisor with programs that misbehave.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::fs::CachePolicy;
use external_hv::qemu::{Accel, Qemu, QemuConfig};
use external_hv::{ExternalVm, MachineSpec};
use tempfile::TempDir;
use vmm_core::vm::{ExitReason, Vm, VmError, VmSize};

const LIMIT: Duration = Duration::from_secs(20);

/// A "QEMU" that does what `script` says.
struct Case {
    dir: TempDir,
    vm: ExternalVm,
}

fn program(dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("qemu");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

fn config(path: &Path) -> QemuConfig {
    QemuConfig {
        path: path.to_owned(),
        accel: Accel::Tcg,
        ..QemuConfig::default()
    }
}

fn case(script: &str, api_limit: Duration) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let path = program(dir.path(), script);
    let (qemu, _) = Qemu::new(config(&path), &Err("no KVM".to_owned())).unwrap();
    let (share, vm_dir) = (dir.path().join("share"), dir.path().join("vm"));
    fs::create_dir(&share).unwrap();
    fs::create_dir(&vm_dir).unwrap();
    let spec = MachineSpec {
        name: "pod".to_owned(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        kernel: "/nonexistent/vmlinux".into(),
        initramfs: None,
        cmdline: String::new(),
        dir: vm_dir,
        share,
        share_tag: "share".to_owned(),
        share_workers: 1,
        share_cache: CachePolicy::Auto,
        console_cap_bytes: 64 << 10,
        net_slots: 1,
        disk_slots: 1,
        balloon: true,
        control_port: 1024,
        most: VmSize {
            vcpus: 1,
            memory_bytes: 128 << 20,
        },
        api_limit,
        outlives_daemon: false,
    };
    let supervisor = PathBuf::from(env!("CARGO_BIN_EXE_kuasar-vmm-supervisor"));
    let vm = ExternalVm::new(Arc::new(qemu), spec, supervisor);
    Case { dir, vm }
}

/// An error with all its causes.
fn told(error: &VmError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl Case {
    /// Ends the VM and waits until its processes are gone.
    async fn end(self) {
        let pids: Vec<u32> = self.vm.supervisor_pid().into_iter().collect();
        self.vm.stop(LIMIT).await.unwrap();
        drop(self.vm);
        for pid in pids {
            assert!(
                !Path::new(&format!("/proc/{pid}")).exists(),
                "process {pid} is left"
            );
        }
        // Our end of every socket is gone; the folder can go.
        drop(self.dir);
    }
}

#[test]
fn a_program_that_cannot_be_run_is_named_by_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = program(dir.path(), "");
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let missing = dir.path().join("missing");
    for (path, why) in [
        (path.as_path(), "not executable"),
        (&missing, "No such file"),
        (dir.path(), "not a file"),
    ] {
        let error = Qemu::new(config(path), &Err(String::new())).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("hypervisor.qemu.path = "), "{text}");
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn kvm_that_is_wanted_and_missing_is_an_error_and_auto_says_what_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = program(dir.path(), "");
    let no_kvm = Err("/dev/kvm does not exist".to_owned());
    let kvm = QemuConfig {
        accel: Accel::Kvm,
        ..config(&path)
    };
    let error = Qemu::new(kvm, &no_kvm).unwrap_err().to_string();
    assert!(error.contains("hypervisor.qemu.accel"), "{error}");
    let auto = QemuConfig {
        accel: Accel::Auto,
        ..config(&path)
    };
    let (qemu, notice) = Qemu::new(auto, &no_kvm).unwrap();
    assert!(qemu.translates());
    assert!(notice.unwrap().contains("TCG"));
}

#[tokio::test]
async fn a_vmm_that_ends_at_once_says_why() {
    let case = case("echo 'no such board' >&2; exit 3", LIMIT);
    let error = case.vm.start().await.unwrap_err();
    let text = told(&error);
    assert!(text.contains("exit status 3"), "{text}");
    assert!(text.contains("no such board"), "{text}");
    case.end().await;
}

#[tokio::test]
async fn a_vmm_that_never_answers_is_given_up() {
    for script in ["exec sleep 1000", "kill -STOP $$"] {
        let case = case(script, Duration::from_millis(500));
        let error = case.vm.start().await.unwrap_err();
        let text = told(&error);
        assert!(text.contains("did not"), "{text}");
        case.end().await;
    }
}

#[tokio::test]
async fn a_vmm_that_speaks_another_language_is_given_up() {
    // What it writes to its socket is no greeting.
    let script = "exec python3 -c 'import socket\n\
                  s=socket.socket(fileno=5); c,_=s.accept(); c.send(b\"hello\\n\")\n\
                  import time; time.sleep(1000)'";
    if !Path::new("/usr/bin/python3").exists() {
        println!("skipped: there is no python3");
        return;
    }
    let case = case(script, Duration::from_secs(10));
    let text = told(&case.vm.start().await.unwrap_err());
    assert!(text.contains("protocol"), "{text}");
    case.end().await;
}

#[tokio::test]
async fn a_vm_that_was_stopped_does_nothing_more() {
    let case = case("exec sleep 1000", Duration::from_millis(200));
    case.vm.stop(LIMIT).await.unwrap();
    case.vm.stop(LIMIT).await.unwrap();
    assert_eq!(*case.vm.exited().borrow(), Some(ExitReason::Stopped));
    for result in [
        case.vm.start().await,
        case.vm.pause().await,
        case.vm.connect(1, LIMIT).await.map(drop),
        case.vm.listen(1).map(drop),
    ] {
        assert!(matches!(result, Err(VmError::Exited(_))), "{result:?}");
    }
    case.end().await;
}
