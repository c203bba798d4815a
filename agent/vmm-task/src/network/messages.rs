//! The agent's words for a network in the kernel's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_api::rpc::{Interface, IpPrefix, Neighbour, Route};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};

use crate::error::AgentError;

/// Address, MTU and name are taken over before the card goes up.
pub(super) fn link(interface: &Interface, index: u32) -> Result<LinkMessage, AgentError> {
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

pub(super) fn address_message(index: u32, ip: IpAddr, prefix_len: u8) -> AddressMessage {
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

pub(super) fn route_message(
    route: &Route,
    index: u32,
) -> Result<(RouteMessage, String), AgentError> {
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

pub(super) fn neighbour_message(
    neighbour: &Neighbour,
    index: u32,
) -> Result<NeighbourMessage, AgentError> {
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

pub(super) fn prefix(field: &'static str, prefix: &IpPrefix) -> Result<(IpAddr, u8), AgentError> {
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
