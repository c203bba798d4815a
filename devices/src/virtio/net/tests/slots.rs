//! Attach, detach, link state, reset, snapshots.

use std::sync::Arc;

use super::*;
use crate::virtio::net::{AttachError, DetachError};

#[test]
fn taps_come_and_go() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.provide(0, 200, 1024);
        for round in 1..=50 {
            assert_eq!(nic.status(), 0);
            let tap = tap("tap0", 1);
            let wire = Wire::new("tap0");
            nic.handle.attach(tap).unwrap();
            assert_eq!(nic.driver.interrupt.config_count(), round * 2 - 1);
            assert_eq!(nic.status(), 1);
            let out = frame(MAC, BROADCAST, &payload(1, 60));
            nic.send(1, &out);
            assert_eq!(wire.receive(), out);
            let back = frame(HOST, MAC, &payload(2, 60));
            wire.send(&back);
            assert_eq!(nic.receive(0).0, back);
            nic.handle.detach(SOON).unwrap();
            assert_eq!(nic.driver.interrupt.config_count(), round * 2);
            wait_gone("tap0");
        }
        let err = nic.handle.detach(SOON).unwrap_err();
        assert!(matches!(err, DetachError::Empty), "{err}");
    });
}

#[test]
fn a_slot_holds_one_tap() {
    in_namespace(|| {
        let nic = Nic::inactive(NetConfig::new(MAC));
        nic.handle.attach(tap("tap0", 1)).unwrap();
        assert!(nic.handle.is_attached());
        let err = nic.handle.attach(tap("tap1", 1)).unwrap_err();
        assert!(matches!(err, AttachError::Occupied), "{err}");
        // Nobody drives the device: nothing to wait for.
        nic.handle.detach(SOON).unwrap();
        assert!(!nic.handle.is_attached());
    });
}

#[test]
fn without_a_link_frames_are_dropped() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        let out = frame(MAC, BROADCAST, &payload(1, 60));
        nic.send(1, &out);
        assert_eq!(nic.handle.stats().tx_dropped, 1);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        nic.handle.set_link(false).unwrap();
        assert_eq!(nic.status(), 0);
        nic.provide(0, 100, 1024);
        wire.send(&frame(HOST, MAC, &payload(3, 60)));
        nic.send(1, &out);
        nic.send(1, &out);
        assert!(wire.is_quiet());
        assert_eq!(nic.driver.queues[0].used_pending(), 0);
        nic.handle.set_link(true).unwrap();
        assert_eq!(nic.status(), 1);
        nic.send(1, &out);
        assert_eq!(wire.receive(), out);
        assert_eq!(nic.driver.interrupt.config_count(), 3);
    });
}

#[test]
fn an_interface_deleted_by_somebody_else_takes_the_link_down() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        ip("link delete tap0");
        nic.provide(0, 100, 1024);
        let interrupt = Arc::clone(&nic.driver.interrupt);
        assert!(interrupt.wait_until(|interrupt| interrupt.config_count() == 2));
        assert_eq!(nic.status(), 0);
        assert!(!nic.handle.is_attached());
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        let out = frame(MAC, BROADCAST, &payload(1, 60));
        nic.send(1, &out);
        assert_eq!(wire.receive(), out);
    });
}

#[test]
fn activation_works_again_after_reset() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        for round in 0..5 {
            nic.driver.device.reset();
            nic.driver.device.reset();
            let mut fresh = DeviceDriver::new(Net::new(NetConfig::new(MAC)).unwrap().0);
            std::mem::swap(&mut fresh.device, &mut nic.driver.device);
            fresh.activate().unwrap();
            nic.driver = fresh;
            let out = frame(MAC, BROADCAST, &payload(round, 60));
            nic.send(1, &out);
            assert_eq!(wire.receive(), out);
        }
    });
}

/// A clone carries on where its template was: with the queues' positions taken from the
/// used rings, as no buffer is held back.
#[test]
fn a_restored_device_carries_on() {
    in_namespace(|| {
        let config = NetConfig {
            queue_pairs: 2,
            ..NetConfig::new(MAC)
        };
        let mut nic = Nic::new(config.clone(), 0);
        nic.handle.attach(tap("tap0", 2)).unwrap();
        let wire = Wire::new("tap0");
        nic.provide(0, 100, 1024);
        nic.provide(2, 100, 1024);
        assert_eq!(nic.command(4, 1, 1, &[2, 5, 5, 5, 5, 5]), 0);
        let first = frame(HOST, MAC, &payload(1, 60));
        wire.send(&first);
        nic.wait(|handle| handle.stats().rx_frames == 1);
        let received = nic.driver.queues[0].pop_used();
        assert_eq!(received.unwrap().data[HEADER_BYTES..], first);
        nic.driver.device.quiesce();
        let state = nic.driver.device.save().unwrap();
        nic.handle.detach(SOON).unwrap();

        let (mut device, handle) = Net::new(config).unwrap();
        device.restore(&state).unwrap();
        drop(std::mem::replace(&mut nic.driver.device, device));
        nic.handle = handle;
        nic.handle.attach(tap("tap1", 2)).unwrap();
        let wire = Wire::new("tap1");
        let told = nic.driver.interrupt.config_count();
        nic.driver.activate().unwrap();
        // The link was down for a while.
        assert_eq!(nic.driver.interrupt.config_count(), told + 1);
        assert_eq!(nic.handle.mac(), [2, 5, 5, 5, 5, 5]);
        for round in 0..10 {
            let sent = frame(HOST, MAC, &payload(round, 80));
            wire.send(&sent);
            assert_eq!(nic.receive(0).0, sent);
            let out = frame(MAC, BROADCAST, &payload(round, 60));
            nic.send(1, &out);
            assert_eq!(wire.receive(), out);
        }
    });
}

/// What the driver has set outlasts a pause, frames that come meanwhile wait in the tap.
#[test]
fn a_quiesced_device_carries_on() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.attach(tap("tap0", 1)).unwrap();
        let wire = Wire::new("tap0");
        let mac = [2, 5, 5, 5, 5, 5];
        assert_eq!(nic.command(2, 1, 1, &mac), 0);
        nic.provide(0, 100, 1024);
        for round in 0..5 {
            nic.driver.device.quiesce();
            nic.driver.device.quiesce();
            let sent = frame(HOST, MAC, &payload(round, 80));
            wire.send(&sent);
            nic.driver.activate().unwrap();
            assert_eq!(nic.receive(0).0, sent);
            assert_eq!(nic.handle.mac(), mac);
            let out = frame(MAC, BROADCAST, &payload(round, 60));
            nic.send(1, &out);
            assert_eq!(wire.receive(), out);
        }
        nic.driver.device.reset();
        nic.driver.device.quiesce();
        nic.driver.activate().unwrap();
        assert_eq!(nic.handle.mac(), MAC, "a reset forgets the settings");
    });
}

#[test]
fn no_fd_outlives_detach_reset_or_the_device() {
    const NAME: &str = "virtio::net::tests::slots::no_fd_outlives_detach_reset_or_the_device";
    if process::elsewhere(NAME) {
        return;
    }
    let open_fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    in_namespace(move || {
        let outside = open_fds();
        let mut nic = Nic::inactive(NetConfig::new(MAC));
        let inactive = open_fds();
        for _ in 0..10 {
            nic.driver.activate().unwrap();
            let active = open_fds();
            nic.handle.attach(tap("tap0", 1)).unwrap();
            assert_eq!(open_fds(), active + 1);
            nic.handle.detach(SOON).unwrap();
            assert_eq!(open_fds(), active);
            nic.handle.attach(tap("tap0", 1)).unwrap();
            nic.driver.device.reset();
            nic.handle.detach(SOON).unwrap();
            assert_eq!(open_fds(), inactive);
        }
        drop(nic);
        assert_eq!(open_fds(), outside);
    });
}
