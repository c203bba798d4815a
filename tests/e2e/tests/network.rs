//! Pods on a network that the test makes as CNI would: a bridge in one namespace, the pod's
//! interface in another. No containerd is needed.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use e2e::World;
use harness::netns::NetNs;
use harness::{eventually, kvm_missing, skip_if};

/// Packets are handled by an emulated kernel on some hosts.
const SLOW: Duration = Duration::from_secs(300);

/// A bridge, and a pod's namespace with one interface on it.
struct Net {
    bridge: NetNs,
    pod: NetNs,
}

impl Net {
    fn new() -> Self {
        let (bridge, pod) = (NetNs::new(), NetNs::new());
        bridge.ip("link add br0 type bridge");
        bridge.ip("address add 10.77.0.1/24 dev br0");
        bridge.ip("address add fd77::1/64 dev br0 nodad");
        bridge.ip("link set br0 up");
        let net = Self { bridge, pod };
        net.plug("eth0", "02:77:00:00:00:02");
        net.pod.ip("address add 10.77.0.2/24 dev eth0");
        net.pod.ip("address add 10.77.0.3/32 dev eth0");
        net.pod.ip("address add fd77::2/64 dev eth0 nodad");
        net.pod.ip("route add default via 10.77.0.1");
        net.pod.ip("-6 route add default via fd77::1");
        net
    }

    /// Gives the pod another interface on the bridge.
    fn plug(&self, name: &str, mac: &str) {
        let pod = self.pod.path();
        let pod = pod.display();
        self.bridge
            .ip(&format!("link add port-{name} mtu 1400 type veth peer name {name} mtu 1400 address {mac} netns {pod}"));
        self.bridge
            .ip(&format!("link set port-{name} master br0 up"));
        self.pod.ip(&format!("link set {name} up"));
    }

    /// What the peer at `address` answers to an HTTP request.
    fn get(&self, address: &str) -> String {
        let address: SocketAddr = address.parse().unwrap();
        self.bridge.run(|| {
            let mut stream = TcpStream::connect_timeout(&address, SLOW).unwrap();
            stream.set_read_timeout(Some(SLOW)).unwrap();
            stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    }

    /// Nothing of ours is left in the pod's namespace.
    fn assert_as_before(&self) {
        let links = self.pod.ip("link");
        assert!(!links.contains("tap_kua"), "{links}");
        assert!(!links.contains("ingress"), "{links}");
    }
}

/// Starts a detached pod in `net` that serves a page.
fn serve(world: &World, net: &Net, name: &str) {
    let netns = net.pod.path();
    #[rustfmt::skip]
    world.ctl.run([
        "run", "--detach", "--name", name, "--netns", netns.to_str().unwrap(),
        "--rootfs", world.rootfs.to_str().unwrap(), "--", "/bin/sh", "-c",
        "mkdir -p /tmp/www; echo served > /tmp/www/page; exec httpd -f -p 80 -h /tmp/www",
    ]).expect_code(0);
}

fn exec(world: &World, name: &str, script: &str) -> String {
    let out = world.ctl.run(["exec", name, "--", "/bin/sh", "-c", script]);
    out.expect_code(0).stdout.clone()
}

#[test]
fn a_pod_is_reachable_and_reaches_others() {
    skip_if!(kvm_missing());
    skip_if!(NetNs::missing());
    let world = World::new();
    let net = Net::new();
    serve(&world, &net, "web");

    let seen = exec(
        &world,
        "web",
        "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address; ip address show eth0; \
         ip route; ip -6 route",
    );
    assert!(seen.starts_with("1400\n02:77:00:00:00:02\n"), "{seen}");
    for line in [
        "inet 10.77.0.2/24",
        "inet 10.77.0.3/32",
        "inet6 fd77::2/64",
        "default via 10.77.0.1 dev eth0",
        "default via fd77::1 dev eth0",
    ] {
        assert!(seen.contains(line), "{line} in {seen}");
    }

    // From outside, over each address and family.
    for address in ["10.77.0.2", "fd77::2"] {
        eventually("an answer to a ping", SLOW, || {
            net.bridge.pings(address).then_some(())
        });
    }
    net.bridge.ip("route add 10.77.0.3/32 dev br0");
    for address in ["10.77.0.2:80", "10.77.0.3:80", "[fd77::2]:80"] {
        let answer = eventually("the pod's server", SLOW, || {
            let answer = net.get(address);
            (!answer.is_empty()).then_some(answer)
        });
        assert!(answer.ends_with("served\n"), "{address}: {answer}");
    }

    // From inside. More than fits a frame, so that segments are made and put together.
    let listener = net
        .bridge
        .run(|| TcpListener::bind("10.77.0.1:9000").unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SLOW)).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        (got.len(), peer.ip().to_string())
    });
    let ping = exec(
        &world,
        "web",
        "ping -c 1 -W 20 10.77.0.1; ping -c 1 -W 20 fd77::1; \
         dd if=/bin/busybox bs=1000 count=20 2>/dev/null | nc -w 200 10.77.0.1 9000",
    );
    assert_eq!(ping.matches("1 packets received").count(), 2, "{ping}");
    let (bytes, peer) = server.join().unwrap();
    assert_eq!((bytes, peer.as_str()), (20_000, "10.77.0.2"));

    world.ctl.run(["rm", "--force", "web"]).expect_code(0);
    net.assert_as_before();
    world.assert_nothing_left();
}

#[test]
fn a_pod_ends_cleanly_after_its_network() {
    skip_if!(kvm_missing());
    skip_if!(NetNs::missing());
    let world = World::new();
    let net = Net::new();
    serve(&world, &net, "web");
    // The order of iSulad: CNI takes interface and namespace away, then the pod is stopped.
    net.pod.ip("link delete eth0");
    net.pod.unbind();
    let still = exec(
        &world,
        "web",
        // A card of an external VM is gone; one of ours is there, and down.
        "echo lives; cat /sys/class/net/eth0/operstate 2>/dev/null; true",
    );
    assert!(still.starts_with("lives\n"), "{still}");
    world.ctl.run(["rm", "--force", "web"]).expect_code(0);
    world.assert_nothing_left();
}

#[test]
fn a_pod_has_as_many_cards_as_there_are_slots() {
    skip_if!(kvm_missing());
    skip_if!(NetNs::missing());
    let net = Net::new();
    net.plug("net1", "02:77:00:00:00:12");
    net.pod.ip("address add 10.77.0.12/24 dev net1");

    // Fewer slots than interfaces: said at once, and nothing stays.
    let world = World::new();
    #[rustfmt::skip]
    let refused = world.ctl.run([
        "run", "--netns", net.pod.path().to_str().unwrap(),
        "--rootfs", world.rootfs.to_str().unwrap(), "--", "/bin/true",
    ]);
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("vm.net_slots"), "{refused:?}");
    net.assert_as_before();
    world.assert_nothing_left();
    drop(world);

    let world = World::with_config("[vm]\nnet_slots = 2\n");
    serve(&world, &net, "two");
    let seen = exec(&world, "two", "cat /sys/class/net/*/address");
    for mac in ["02:77:00:00:00:02", "02:77:00:00:00:12"] {
        assert!(seen.contains(mac), "{seen}");
    }
    for address in ["10.77.0.2", "10.77.0.12"] {
        eventually("an answer to a ping", SLOW, || {
            net.bridge.pings(address).then_some(())
        });
    }
    world.ctl.run(["rm", "--force", "two"]).expect_code(0);
    net.assert_as_before();
    world.assert_nothing_left();
}
