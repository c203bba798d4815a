//! Nothing of a machine is left when it is dropped. A test binary of its own: it counts
//! what the whole process has.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    missing_docs
)]

use std::fs;
use std::time::Duration;

use devices::virtio::vsock::VsockConfig;
use vmm_core::vm::Vm;
use vmm_core::{DeviceSet, Host, Machine, MachineConfig};

#[allow(dead_code, reason = "shared with the unit tests")]
#[path = "../src/machine/tests/guest.rs"]
mod guest;

/// Threads, open fds, and mappings of files and KVM of this process.
fn census() -> (usize, usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (
        fs::read_dir("/proc/self/task").unwrap().count(),
        fs::read_dir("/proc/self/fd").unwrap().count(),
        maps.lines()
            .filter(|line| line.contains("memfd:") || line.contains("kvm"))
            .count(),
    )
}

#[test]
fn twenty_machines_leave_nothing_behind() {
    let host = match Host::probe() {
        Ok(host) => host,
        Err(err) => {
            println!("skipped: {err}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let kernel = guest::Code::new().print("up\n").spin().kernel(dir.path());
    let socket = dir.path().join("vsock.sock");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // Whatever the runtime creates once is created now.
    runtime.block_on(async { tokio::task::spawn_blocking(|| {}).await.unwrap() });

    let build = || {
        let mut config = MachineConfig::new("leaks", &kernel);
        config.vcpus = 2;
        config.memory_bytes = 64 << 20;
        config.console.path = Some(dir.path().join("console.log"));
        let mut vsock = VsockConfig::new(3);
        vsock.uds_path = Some(socket.clone());
        let devices = DeviceSet::new().with_rng().unwrap();
        config.devices = devices.with_vsock(vsock).unwrap();
        Machine::build(&host, config)
    };
    let before = census();
    for round in 0..20 {
        let machine = build().unwrap();
        assert!(socket.exists());
        runtime.block_on(async {
            machine.start().await.unwrap();
            if round % 2 == 0 {
                machine.stop(Duration::from_secs(60)).await.unwrap();
                assert!(!socket.exists());
            }
        });
        drop(machine);
        assert!(!socket.exists());
        assert_eq!(census(), before, "round {round}");
    }
    // A build that fails on the way, too.
    fs::write(&kernel, b"\x7fELF").unwrap();
    build().unwrap_err();
    assert_eq!(census(), before);
}
