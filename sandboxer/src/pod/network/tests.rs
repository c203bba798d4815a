//! In network namespaces of the test's own.

use harness::netns::NetNs;

use super::*;

/// Ends a test early, saying why, where there can be no namespaces.
macro_rules! namespaces {
    () => {
        if let Some(why) = NetNs::missing() {
            println!("skipped: {why}");
            return;
        }
    };
}

/// A namespace as CNI leaves it, and the one at the other end of its interface.
fn pod() -> (NetNs, NetNs) {
    let (pod, wire) = (NetNs::new(), NetNs::new());
    pod.ip("link add eth0 mtu 1400 address 02:00:00:00:00:55 type veth peer name peer0");
    pod.ip(&format!("link set peer0 netns {}", wire.path().display()));
    wire.ip("link set peer0 up");
    pod.ip("link set eth0 up");
    pod.ip("address add 10.1.2.3/24 dev eth0");
    pod.ip("address add 10.1.2.4/32 dev eth0");
    pod.ip("address add fd00::3/64 dev eth0 nodad");
    pod.ip("route add default via 10.1.2.1 metric 5 src 10.1.2.4");
    pod.ip("route add 10.9.0.0/16 via 192.0.2.1 dev eth0 onlink mtu 1300");
    pod.ip("-6 route add default via fd00::1");
    pod.ip("neigh add 10.1.2.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    pod.ip("neigh add 10.1.2.2 lladdr 02:00:00:00:00:02 dev eth0 nud reachable");
    (pod, wire)
}

fn redirected(pod: &NetNs) -> String {
    pod.run(|| {
        let show = std::process::Command::new("tc")
            .args(["filter", "show", "dev", "eth0", "ingress"])
            .output();
        let show = show.expect("run tc");
        String::from_utf8_lossy(&show.stdout).into_owned()
    })
}

fn text(prefix: &rpc::IpPrefix) -> String {
    let ip: std::net::IpAddr = match <[u8; 4]>::try_from(prefix.ip.as_slice()) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(prefix.ip.as_slice()).unwrap().into(),
    };
    format!("{ip}/{}", prefix.prefix_len)
}

#[test]
fn what_cni_made_is_described_to_the_guest() {
    namespaces!();
    let (pod, _wire) = pod();
    let (network, taps) = PodNetwork::connect(&pod.path(), 1).unwrap();
    assert_eq!(taps.len(), 1);
    let request = network.describe();

    let [card] = request.interfaces.as_slice() else {
        panic!("{:?}", request.interfaces);
    };
    assert_eq!((card.device.as_str(), card.name.as_str()), ("eth0", "eth0"));
    assert_eq!(card.mac, [2, 0, 0, 0, 0, 0x55]);
    assert_eq!(card.mtu, 1400);
    let mut addresses: Vec<_> = card.addresses.iter().map(text).collect();
    addresses.sort();
    assert_eq!(addresses, ["10.1.2.3/24", "10.1.2.4/32", "fd00::3/64"]);

    let mut routes: Vec<_> = request
        .routes
        .iter()
        .map(|route| (text(&route.destination), route.clone()))
        .collect();
    routes.sort_by(|a, b| a.0.cmp(&b.0));
    let names: Vec<_> = routes.iter().map(|(name, _)| name.as_str()).collect();
    let expected = [
        "0.0.0.0/0",
        "10.1.2.0/24",
        "10.9.0.0/16",
        "::/0",
        "fd00::/64",
    ];
    assert_eq!(names, expected);
    let default = &routes[0].1;
    assert_eq!(default.gateway, [10, 1, 2, 1]);
    assert_eq!(default.source, [10, 1, 2, 4]);
    assert_eq!(default.metric, 5);
    assert!(routes[2].1.on_link);
    assert_eq!(routes[2].1.mtu, 1300);
    assert!(routes[1].1.gateway.is_empty());

    // The one that somebody set, not the one that was learnt.
    assert_eq!(request.neighbours.len(), 1);
    assert_eq!(request.neighbours[0].mac, [2, 0, 0, 0, 0, 1]);
}

#[test]
fn frames_are_redirected_until_the_owner_goes() {
    namespaces!();
    let (pod, _wire) = pod();
    for _ in 0..3 {
        let (network, taps) = PodNetwork::connect(&pod.path(), 1).unwrap();
        let tap = taps[0].name().to_owned();
        assert!(redirected(&pod).contains(&tap), "{}", redirected(&pod));
        let link = pod.ip(&format!("link show {tap}"));
        assert!(link.contains("mtu 1400") && link.contains("UP"), "{link}");
        let own = pod.ip(&format!("address show {tap}"));
        assert!(!own.contains("inet6"), "{own}");
        drop(taps);
        drop(network);
        assert_eq!(redirected(&pod), "");
        assert!(!pod.ip("link").contains("tap_kua"));
    }
}

#[test]
fn what_a_daemon_left_is_replaced() {
    namespaces!();
    let (pod, _wire) = pod();
    let (network, taps) = PodNetwork::connect(&pod.path(), 1).unwrap();
    // The kernel closed the tap, nobody took the queue off the interface.
    drop(taps);
    std::mem::forget(network);
    let (_network, taps) = PodNetwork::connect(&pod.path(), 1).unwrap();
    let filters = redirected(&pod);
    assert_eq!(filters.matches("mirred").count(), 1, "{filters}");
    drop(taps);
}

#[test]
fn cni_may_be_faster() {
    namespaces!();
    // The interface goes first.
    let (pod_a, _wire) = pod();
    let (network, taps) = PodNetwork::connect(&pod_a.path(), 1).unwrap();
    pod_a.ip("link delete eth0");
    drop(taps);
    drop(network);
    assert!(!pod_a.ip("link").contains("tap_kua"));
    // So does the whole namespace.
    let (pod_b, _wire) = pod();
    let (network, taps) = PodNetwork::connect(&pod_b.path(), 1).unwrap();
    drop(pod_b);
    drop(taps);
    drop(network);
}

#[test]
fn a_namespace_without_interfaces_has_no_cards() {
    namespaces!();
    let pod = NetNs::new();
    pod.ip("link add down0 type veth peer name down1");
    let (network, taps) = PodNetwork::connect(&pod.path(), 1).unwrap();
    assert!(taps.is_empty());
    let request = network.describe();
    assert_eq!(*request, rpc::Network::default());
}

#[test]
fn what_cni_changes_later_is_found() {
    namespaces!();
    let bare = NetNs::new();
    let (mut network, taps) = PodNetwork::connect(&bare.path(), 2).unwrap();
    assert!(taps.is_empty());
    assert!(network.refresh().unwrap().is_empty());
    // Interfaces that come, of which one has no slot.
    for n in 0..3 {
        bare.ip(&format!("link add net{n} type veth peer name peer{n}"));
        bare.ip(&format!("link set net{n} up"));
    }
    bare.ip("address add 10.6.0.2/24 dev net0");
    let changes = network.refresh().unwrap();
    assert!(
        matches!(changes.as_slice(), [Change::Plug(0, _), Change::Plug(1, _)]),
        "{changes:?}"
    );
    let names = |network: &PodNetwork| -> Vec<String> {
        let cards = network.describe().interfaces.iter();
        cards
            .map(|card| format!("{}={}", card.device, card.name))
            .collect()
    };
    assert_eq!(names(&network), ["eth0=net0", "eth1=net1"]);
    assert_eq!(network.describe().routes.len(), 1);
    // Our own taps are none of them, and nothing changes by looking again.
    assert!(network.refresh().unwrap().is_empty());
    bare.ip("address add 10.6.0.3/32 dev net0");
    let before = network.describe().clone();
    assert!(network.refresh().unwrap().is_empty());
    assert_ne!(*network.describe(), before);
    // One goes, and the slot serves the one that had none.
    bare.ip("link delete net0");
    let gone = network.refresh().unwrap();
    assert!(
        matches!(gone.as_slice(), [Change::Unplug(0), Change::Plug(0, _)]),
        "{gone:?}"
    );
    assert_eq!(names(&network), ["eth0=net2", "eth1=net1"]);
    drop((changes, gone));
    drop(network);
    assert!(!bare.ip("link").contains("ingress"));
}
