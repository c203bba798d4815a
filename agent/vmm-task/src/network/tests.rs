use std::net::IpAddr;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn network(ip: &str, prefix_len: u32) -> IpPrefix {
    IpPrefix {
        ip: bytes(ip),
        prefix_len,
        ..Default::default()
    }
}

fn route(destination: IpPrefix, gateway: &str) -> Route {
    Route {
        device: "net0".to_owned(),
        destination: Some(destination).into(),
        gateway: if gateway.is_empty() {
            Vec::new()
        } else {
            bytes(gateway)
        },
        ..Default::default()
    }
}

fn request() -> rpc::Network {
    rpc::Network {
        interfaces: vec![Interface {
            device: "eth0".to_owned(),
            name: "net0".to_owned(),
            mac: vec![2, 0, 0, 0, 0, 9],
            mtu: 1400,
            addresses: vec![network("10.1.2.3", 24), network("fd00::3", 64)],
            ..Default::default()
        }],
        // A default route comes before the one that makes its gateway reachable.
        routes: vec![
            Route {
                metric: 7,
                source: bytes("10.1.2.3"),
                ..route(network("0.0.0.0", 0), "10.1.2.1")
            },
            Route {
                on_link: true,
                mtu: 1300,
                ..route(network("10.9.0.0", 16), "192.0.2.1")
            },
            route(network("::", 0), "fd00::1"),
            route(network("10.1.2.0", 24), ""),
            route(network("fd00::", 64), ""),
        ],
        neighbours: vec![Neighbour {
            device: "net0".to_owned(),
            ip: bytes("10.1.2.1"),
            mac: vec![2, 0, 0, 0, 0, 1],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn ip(args: &str) -> String {
    let out = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {args}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// Runs in a network namespace of its own with a card `eth0`.
fn with_card(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("skipped: no network namespace can be made: {e}");
        } else if Command::new("ip").arg("-V").output().is_err() {
            println!("skipped: `ip` is not installed");
        } else {
            ip("link add eth0 type veth peer name peer0");
            ip("link set peer0 up");
            test();
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_card_gets_what_the_host_found() {
    with_card(|| {
        Network::default().apply(&request()).unwrap();
        let link = ip("link show net0");
        assert!(link.contains("mtu 1400") && link.contains("UP"), "{link}");
        assert!(link.contains("02:00:00:00:00:09"), "{link}");
        let addresses = ip("addr show net0");
        assert!(addresses.contains("inet 10.1.2.3/24"), "{addresses}");
        assert!(addresses.contains("inet6 fd00::3/64"), "{addresses}");
        assert!(!addresses.contains("tentative noprefix"), "{addresses}");
        let routes = ip("route");
        for line in [
            "default via 10.1.2.1 dev net0 proto static src 10.1.2.3 metric 7",
            "10.1.2.0/24 dev net0 proto static scope link",
            "10.9.0.0/16 via 192.0.2.1 dev net0 proto static onlink mtu 1300",
        ] {
            let found = routes.lines().any(|found| found.trim_end() == line);
            assert!(found, "{line:?} in {routes}");
        }
        let routes = ip("-6 route");
        assert!(routes.contains("default via fd00::1 dev net0"), "{routes}");
        let neighbours = ip("neigh");
        assert!(
            neighbours.contains("10.1.2.1 dev net0 lladdr 02:00:00:00:00:01 PERMANENT"),
            "{neighbours}"
        );
    });
}

#[test]
fn two_cards_may_be_on_one_network() {
    with_card(|| {
        ip("link add eth1 type veth peer name peer1");
        ip("link set peer1 up");
        let mut request = request();
        let mut other = request.interfaces[0].clone();
        other.device = "eth1".to_owned();
        other.name = "net1".to_owned();
        other.addresses = vec![network("10.1.2.4", 24), network("fd00::4", 64)];
        request.interfaces.push(other);
        for index in [3, 4] {
            let mut route = request.routes[index].clone();
            route.device = "net1".to_owned();
            request.routes.push(route);
        }
        Network::default().apply(&request).unwrap();
        let routes = ip("route");
        assert!(routes.contains("10.1.2.0/24 dev net0"), "{routes}");
        assert!(routes.contains("10.1.2.0/24 dev net1"), "{routes}");
        let routes = ip("-6 route");
        assert!(routes.contains("fd00::/64 dev net1"), "{routes}");
    });
}

#[test]
fn what_cannot_be_set_is_named() {
    with_card(|| {
        let error = |change: &dyn Fn(&mut rpc::Network)| {
            let mut request = request();
            change(&mut request);
            Network::default().apply(&request).unwrap_err().to_string()
        };
        let e = error(&|r| r.interfaces[0].device = "eth7".to_owned());
        assert!(e.contains("\"eth7\""), "{e}");
        let e = error(&|r| r.interfaces[0].mac = vec![1, 2]);
        assert!(e.contains("interfaces.mac"), "{e}");
        let e = error(&|r| r.interfaces[0].addresses[0].prefix_len = 33);
        assert!(e.contains("33 bits"), "{e}");
        let e = error(&|r| {
            r.interfaces[0].device = "net0".to_owned();
            r.routes[0].gateway = bytes("172.16.0.1");
        });
        assert!(e.contains("route to 0.0.0.0/0"), "{e}");
    });
}

#[test]
fn a_pod_without_network_needs_no_netlink() {
    Network::default().apply(&rpc::Network::default()).unwrap();
}

#[test]
fn cards_come_change_and_go() {
    with_card(|| {
        ip("link add eth1 type veth peer name peer1");
        ip("link set peer1 up");
        // The first slot's card has the name that the kernel gave the second's.
        let mut wanted = request();
        wanted.interfaces[0].name = "eth1".to_owned();
        for route in &mut wanted.routes {
            route.device = "eth1".to_owned();
        }
        wanted.neighbours.clear();
        let mut network = Network::default();
        network.apply(&wanted).unwrap();
        let alone = wanted.clone();
        assert!(ip("addr show eth1").contains("10.1.2.3/24"));

        let mut other = wanted.interfaces[0].clone();
        other.device = "eth1".to_owned();
        other.name = "net1".to_owned();
        other.addresses = vec![self::network("10.5.0.1", 24)];
        wanted.interfaces.push(other);
        wanted.interfaces[0].mtu = 1300;
        wanted.interfaces[0].addresses[0] = self::network("10.1.2.9", 24);
        wanted.routes[0].source = bytes("10.1.2.9");
        wanted.routes[0].metric = 8;
        network.apply(&wanted).unwrap();
        let first = ip("addr show eth1");
        assert!(
            first.contains("10.1.2.9/24") && !first.contains("10.1.2.3"),
            "{first}"
        );
        assert!(first.contains("mtu 1300"), "{first}");
        assert!(ip("addr show net1").contains("10.5.0.1/24"));
        let routes = ip("route");
        assert!(routes.contains("src 10.1.2.9 metric 8"), "{routes}");
        assert!(!routes.contains("metric 7"), "{routes}");
        assert!(routes.contains("10.9.0.0/16"), "{routes}");

        network.apply(&alone).unwrap();
        let second = ip("addr show net1");
        assert!(
            !second.contains("10.5.0.1") && second.contains("DOWN"),
            "{second}"
        );
        network.apply(&rpc::Network::default()).unwrap();
        assert_eq!(ip("route"), "");
        // And plugged in again.
        network.apply(&wanted).unwrap();
        assert!(ip("addr show net1").contains("10.5.0.1/24"));
        assert!(ip("route").contains("default via 10.1.2.1 dev eth1"));
    });
}
