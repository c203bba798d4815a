//! The pod's network: cards, addresses, routes and neighbours, set over netlink.
//!
//! What the host found in the pod's namespace is set as it is: addresses without the routes
//! that the kernel adds on its own, then every route.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use agent_api::rpc::{Interface, IpPrefix, Neighbour, Route, SetupSandboxRequest};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::AgentError;

/// The kernel answers before it returns from taking a request; this bounds a bug of ours.
const ANSWER_SECONDS: i64 = 10;

/// Longer than any answer to a request without a dump.
const ANSWER_BYTES: usize = 4096;

/// Sets up all that the request names.
pub fn apply(request: &SetupSandboxRequest) -> Result<(), AgentError> {
    if request.interfaces.is_empty() && request.routes.is_empty() && request.neighbours.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().map_err(AgentError::io("opening netlink"))?;
    for interface in &request.interfaces {
        let what = format!("network card {}", interface.device);
        let index = index(&interface.device)?;
        let message = link(interface, index)?;
        netlink
            .request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(AgentError::io(what))?;
        for address in &interface.addresses {
            let (ip, prefix_len) = prefix("interfaces.addresses", address)?;
            netlink
                .request(
                    RouteNetlinkMessage::NewAddress(address_message(index, ip, prefix_len)),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
                .map_err(AgentError::io(format!("address {ip}/{prefix_len}")))?;
        }
    }
    // A gateway has to be reachable when its route is added.
    let (through, direct): (Vec<_>, Vec<_>) = request
        .routes
        .iter()
        .partition(|route| !route.gateway.is_empty());
    for route in direct.into_iter().chain(through) {
        let (message, what) = route_message(route, index(&route.device)?)?;
        // Two cards on one network have a route to it each.
        let added = netlink.request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_APPEND,
        );
        match added {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(AgentError::io(what))?,
        }
    }
    for neighbour in &request.neighbours {
        let message = neighbour_message(neighbour, index(&neighbour.device)?)?;
        netlink
            .request(
                RouteNetlinkMessage::NewNeighbour(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .map_err(AgentError::io("a neighbour"))?;
    }
    Ok(())
}

fn index(device: &str) -> Result<u32, AgentError> {
    if_nametoindex(device).map_err(|e| AgentError::io(format!("network card {device:?}"))(e.into()))
}

/// Address, MTU and name are taken over before the card goes up.
fn link(interface: &Interface, index: u32) -> Result<LinkMessage, AgentError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    if !interface.mac.is_empty() {
        let mac = mac("interfaces.mac", &interface.mac)?;
        message.attributes.push(LinkAttribute::Address(mac));
    }
    if interface.mtu > 0 {
        message.attributes.push(LinkAttribute::Mtu(interface.mtu));
    }
    if !interface.name.is_empty() && interface.name != interface.device {
        let name = interface.name.clone();
        message.attributes.push(LinkAttribute::IfName(name));
    }
    Ok(message)
}

fn address_message(index: u32, ip: IpAddr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = prefix_len;
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes.push(AddressAttribute::Local(ip));
    message.attributes.push(AddressAttribute::Address(ip));
    // The host has made sure already that nobody else has it.
    let flags = AddressFlags::Noprefixroute | AddressFlags::Nodad;
    message.attributes.push(AddressAttribute::Flags(flags));
    message
}

fn route_message(route: &Route, index: u32) -> Result<(RouteMessage, String), AgentError> {
    let (ip, prefix_len) = prefix("routes.destination", &route.destination)?;
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = prefix_len;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = if route.gateway.is_empty() && ip.is_ipv4() {
        RouteScope::Link
    } else {
        RouteScope::Universe
    };
    if route.on_link {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Oif(index));
    if prefix_len > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(ip)));
    }
    if !route.gateway.is_empty() {
        let gateway = address("routes.gateway", &route.gateway)?;
        attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    }
    if !route.source.is_empty() {
        let source = address("routes.source", &route.source)?;
        attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu > 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok((message, format!("route to {ip}/{prefix_len}")))
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> Result<NeighbourMessage, AgentError> {
    let ip = address("neighbours.ip", &neighbour.ip)?;
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let destination = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    let mac = mac("neighbours.mac", &neighbour.mac)?;
    message
        .attributes
        .push(NeighbourAttribute::Destination(destination));
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac));
    Ok(message)
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, AgentError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        return Ok(Ipv6Addr::from(v6).into());
    }
    let why = format!("{} bytes are no IP address", bytes.len());
    Err(AgentError::invalid(field, why))
}

fn prefix(field: &'static str, prefix: &IpPrefix) -> Result<(IpAddr, u8), AgentError> {
    let ip = address(field, &prefix.ip)?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix.prefix_len) {
        Ok(len) if len <= most => Ok((ip, len)),
        _ => {
            let why = format!("a prefix of {} bits is too long", prefix.prefix_len);
            Err(AgentError::invalid(field, why))
        }
    }
}

fn mac(field: &'static str, bytes: &[u8]) -> Result<Vec<u8>, AgentError> {
    if bytes.len() == 6 {
        return Ok(bytes.to_vec());
    }
    let why = format!("{} bytes are no Ethernet address", bytes.len());
    Err(AgentError::invalid(field, why))
}

/// A connection to the kernel's routing tables.
struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket = socket(
            nix::sys::socket::AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_SECONDS),
        )?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a request and waits for the kernel's verdict.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut answer = [0; ANSWER_BYTES];
        loop {
            let read = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let got = answer.get(..read).unwrap_or_default();
            let got = NetlinkMessage::<RouteNetlinkMessage>::deserialize(got)
                .map_err(io::Error::other)?;
            if got.header.sequence_number != self.sequence {
                continue;
            }
            if let NetlinkPayload::Error(error) = got.payload {
                return match error.code {
                    None => Ok(()),
                    Some(_) => Err(error.to_io()),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
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

    fn request() -> SetupSandboxRequest {
        SetupSandboxRequest {
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
            apply(&request()).unwrap();
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
            apply(&request).unwrap();
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
            let error = |change: &dyn Fn(&mut SetupSandboxRequest)| {
                let mut request = request();
                change(&mut request);
                apply(&request).unwrap_err().to_string()
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
        apply(&SetupSandboxRequest::default()).unwrap();
    }
}
