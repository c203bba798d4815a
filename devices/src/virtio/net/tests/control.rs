//! Control commands (5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_MQ,
};

use super::*;
use crate::virtio::net::state::NetState;

const OK: u8 = 0;
const ERR: u8 = 1;

fn config() -> NetConfig {
    NetConfig {
        queue_pairs: 2,
        ..NetConfig::new(MAC)
    }
}

fn nic() -> Nic {
    Nic::new(config(), 0)
}

#[test]
fn receive_modes_5_1_6_5_1() {
    let mut nic = nic();
    for mode in 0..6 {
        assert_eq!(nic.command(4, 0, mode, &[1]), OK);
    }
    assert_eq!(nic.command(4, 0, 2, &[0]), OK);
    assert_eq!(nic.command(4, 0, 6, &[1]), ERR);
    assert_eq!(nic.command(4, 0, 0, &[1, 2]), ERR);
    nic.driver.device.quiesce();
    let state = nic.driver.device.save().unwrap();
    let state = NetState::decode(&state, &config()).unwrap();
    assert_eq!(state.settings.rx_mode, 0b11_1011);
}

#[test]
fn addresses_5_1_6_5_2() {
    let mut nic = nic();
    let mac = [2, 1, 2, 3, 4, 5];
    assert_eq!(nic.command(4, 1, 1, &mac), OK);
    let mut config = [0; 6];
    nic.driver.device.read_config(0, &mut config);
    assert_eq!(config, mac);
    assert_eq!(nic.handle.mac(), mac);
    assert_eq!(nic.command(4, 1, 1, &mac[..5]), ERR);

    let table = |unicast: u32, multicast: u32, bytes: usize| {
        let mut data = unicast.to_le_bytes().to_vec();
        data.extend(vec![2; (unicast as usize * 6).min(1000)]);
        data.extend(multicast.to_le_bytes());
        data.resize(data.len() + bytes, 3);
        data
    };
    assert_eq!(nic.command(4, 1, 0, &table(0, 0, 0)), OK);
    assert_eq!(nic.command(4, 1, 0, &table(2, 3, 18)), OK);
    assert_eq!(nic.command(4, 1, 0, &table(2, 3, 17)), ERR);
    assert_eq!(nic.command(4, 1, 0, &table(2, 3, 19)), ERR);
    assert_eq!(nic.command(4, 1, 0, &table(u32::MAX, 3, 18)), ERR);
    assert_eq!(nic.command(4, 1, 0, &table(2, u32::MAX, 18)), ERR);
    // A driver that starts over gets the address the device was made with.
    nic.driver.device.reset();
    nic.driver.activate().unwrap();
    assert_eq!(nic.handle.mac(), MAC);
}

#[test]
fn queue_pairs_5_1_6_5_5() {
    let mut nic = nic();
    for (pairs, answer) in [(0, ERR), (1, OK), (2, OK), (3, ERR), (0x8000, ERR)] {
        assert_eq!(
            nic.command(4, 4, 0, &u16::to_le_bytes(pairs)),
            answer,
            "{pairs} pairs"
        );
    }
}

/// Without MQ the control queue is the third (5.1.2).
#[test]
fn the_control_queue_moves_with_mq() {
    let config = NetConfig {
        queue_pairs: 2,
        ..NetConfig::new(MAC)
    };
    let mut nic = Nic::new(config, 1 << VIRTIO_NET_F_MQ);
    assert_eq!(nic.command(2, 4, 0, &1_u16.to_le_bytes()), OK);
    assert_eq!(nic.command(2, 4, 0, &2_u16.to_le_bytes()), ERR);
}

#[test]
fn offloads_5_1_6_5_6() {
    in_namespace(|| {
        let tap = tap("tap0", 1);
        let without = 1 << VIRTIO_NET_F_GUEST_UFO;
        let mut nic = Nic::new(NetConfig::new(MAC), without);
        nic.handle.attach(tap).unwrap();
        let csum = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
        let tso = 1_u64 << VIRTIO_NET_F_GUEST_TSO4;
        for (offloads, answer) in [
            (0, OK),
            (csum, OK),
            (csum | tso, OK),
            (without, ERR),
            (1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, ERR),
            (u64::MAX, ERR),
        ] {
            let data = offloads.to_le_bytes();
            assert_eq!(nic.command(2, 5, 0, &data), answer, "{offloads:#x}");
        }
        let features = Command::new("ethtool").args(["-k", "tap0"]).output();
        if let Ok(features) = features {
            let text = String::from_utf8_lossy(&features.stdout).into_owned();
            assert!(text.contains("tx-tcp-segmentation: on"), "{text}");
            assert!(text.contains("tx-tcp6-segmentation: off"), "{text}");
        }
    });
}

#[test]
fn announcing_5_1_6_5_4() {
    in_namespace(|| {
        let mut nic = Nic::new(NetConfig::new(MAC), 0);
        nic.handle.announce().unwrap();
        assert_eq!(nic.status(), 0, "only with a link");
        nic.handle.attach(tap("tap0", 1)).unwrap();
        assert_eq!(nic.status(), 3);
        assert_eq!(nic.command(2, 3, 0, &[]), OK);
        assert_eq!(nic.status(), 1);
    });
}

#[test]
fn what_is_no_command_is_refused() {
    let mut nic = nic();
    assert_eq!(nic.command(4, 2, 0, &[1, 0]), ERR, "no VLAN filter");
    assert_eq!(nic.command(4, 99, 99, &[]), ERR);
    let ack = |nic: &mut Nic, chain: &[Buffer]| nic.driver.request(4, chain).data;
    assert_eq!(ack(&mut nic, &[Buffer::Writable(1)]), [ERR]);
    assert_eq!(
        ack(&mut nic, &[Buffer::Readable(vec![1]), Buffer::Writable(1)]),
        [ERR]
    );
    // No ack: nothing to answer to, and nothing done.
    let mut set = vec![1, 1];
    set.extend([2, 9, 9, 9, 9, 9]);
    assert!(ack(&mut nic, &[Buffer::Readable(set.clone())]).is_empty());
    assert_eq!(nic.handle.mac(), MAC);
    // Cut anywhere, it is the same command.
    let (a, b) = set.split_at(1);
    let chain = [
        Buffer::Readable(a.to_vec()),
        Buffer::Readable(b.to_vec()),
        Buffer::Writable(1),
    ];
    assert_eq!(ack(&mut nic, &chain), [OK]);
    assert_eq!(nic.handle.mac(), [2, 9, 9, 9, 9, 9]);
    // More commands than one turn takes.
    for _ in 0..40 {
        nic.driver.queues[4].add(&[Buffer::Readable(vec![0, 0, 1]), Buffer::Writable(1)]);
    }
    nic.driver.queues[4].kick();
    for _ in 0..40 {
        assert_eq!(nic.driver.wait_used(4).data, [OK]);
    }
}
