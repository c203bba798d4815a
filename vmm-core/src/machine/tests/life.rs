//! Starting, pausing, stopping.

use super::*;
use crate::vcpu::VcpuState;
use crate::vm::VmError;

#[test]
fn pausing_stops_the_guest_and_resuming_lets_it_go_on() {
    let Some(host) = host() else { return };
    let machine = machine(
        &host,
        "pause",
        &Code::new().write_port_for_ever(guest::NOWHERE),
    );
    assert_eq!(machine.vcpu_states(), [VcpuState::Created]);
    runtime().block_on(async {
        // Before the start there is nothing to pause.
        machine.pause().await.unwrap();
        machine.start().await.unwrap();
        for _ in 0..20 {
            machine.pause().await.unwrap();
            assert_eq!(machine.vcpu_states(), [VcpuState::Paused]);
            let before = machine.stats().exits["io"];
            tokio::task::yield_now().await;
            assert_eq!(machine.stats().exits["io"], before);
            machine.resume().await.unwrap();
            while machine.stats().exits["io"] == before {
                tokio::task::yield_now().await;
            }
        }
        machine.stop(PATIENCE).await.unwrap();
    });
    assert_eq!(machine.vcpu_states(), []);
    assert!(machine.stats().exits["io"] > 0, "figures outlive the guest");
    assert_eq!(machine.stats().resident_bytes, None);
}

#[test]
fn guests_that_never_exit_are_paused_and_stopped() {
    let Some(host) = host() else { return };
    for (name, code) in [
        ("halted", Code::new().halt()),
        ("spinning", Code::new().spin()),
    ] {
        let machine = machine_with(&host, name, &code, |mut config| {
            config.vcpus = 2;
            config
        });
        runtime().block_on(async {
            machine.start().await.unwrap();
            machine.pause().await.unwrap();
            assert_eq!(machine.vcpu_states(), [VcpuState::Paused; 2], "{name}");
            machine.resume().await.unwrap();
            machine.stop(PATIENCE).await.unwrap();
            assert_eq!(ended(&machine).await, ExitReason::Stopped);
        });
    }
}

#[test]
fn stop_is_idempotent_and_final() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "stopped", &Code::new().halt());
    runtime().block_on(async {
        machine.start().await.unwrap();
        assert_eq!(machine.vcpu_threads().len(), 1);
        let (first, second) = tokio::join!(machine.stop(PATIENCE), machine.stop(PATIENCE));
        first.unwrap();
        second.unwrap();
        machine.stop(PATIENCE).await.unwrap();
        assert!(machine.vcpu_threads().is_empty());
        for result in [
            machine.start().await,
            machine.pause().await,
            machine.resume().await,
        ] {
            assert!(matches!(result, Err(VmError::Exited(ExitReason::Stopped))));
        }
        assert_eq!(*machine.exited().borrow(), Some(ExitReason::Stopped));
    });
}

#[test]
fn the_guests_own_end_is_kept_when_it_is_stopped() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "reset", &Code::new().reset());
    runtime().block_on(async {
        run(&machine).await;
        machine.stop(PATIENCE).await.unwrap();
    });
    assert_eq!(*machine.exited().borrow(), Some(ExitReason::GuestReset));
}

#[test]
fn upper_layers_add_their_phases() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "phases", &Code::new().halt());
    machine.mark_phase("agent ready");
    machine.mark_phase("agent ready");
    let phases = machine.stats().phases;
    let names: Vec<_> = phases.iter().map(|phase| phase.name).collect();
    let expected = [
        "memory mapped",
        "devices attached",
        "vm built",
        "agent ready",
    ];
    assert_eq!(names, expected);
    assert!(phases.is_sorted_by_key(|phase| phase.since));
}

#[test]
fn without_a_vsock_device_streams_are_unsupported() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "novsock", &Code::new().halt());
    runtime().block_on(async {
        let result = machine.connect(1, PATIENCE).await;
        assert!(matches!(result, Err(VmError::Unsupported { .. })));
        assert!(matches!(
            machine.listen(1),
            Err(VmError::Unsupported { .. })
        ));
    });
}

#[test]
fn waiting_for_a_guest_that_ends_does_not_wait_for_the_deadline() {
    let Some(host) = host() else { return };
    let code = Code::new().reset();
    let machine = machine_with(&host, "gone", &code, |mut config| {
        let vsock = devices::virtio::vsock::VsockConfig::new(3);
        config.devices = config.devices.with_vsock(vsock).unwrap();
        config
    });
    runtime().block_on(async {
        let mut listener = machine.listen(7).unwrap();
        let connecting = machine.connect(1, PATIENCE * 10);
        let (connected, ()) = tokio::join!(connecting, async {
            machine.start().await.unwrap();
        });
        assert!(matches!(connected, Err(VmError::Exited(_))));
        assert!(listener.accept().await.is_none());
    });
}
