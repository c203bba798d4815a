//! What CNI set up in a pod's namespace, read over netlink in the words of the agent.

use std::collections::HashMap;
use std::net::IpAddr;

use agent_api::rpc;
use futures::TryStreamExt;
use protobuf::MessageField;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tracing::warn;

use super::super::error::{PodError, Result};
use super::redirect::TAP_PREFIX;

/// An interface of the namespace that the guest is to have as a card.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Card {
    /// Its number in the namespace.
    pub(super) index: u32,
    /// How the guest is to set it up, but for its slot.
    pub(super) interface: rpc::Interface,
}

/// The network of a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Found {
    pub(super) cards: Vec<Card>,
    pub(super) routes: Vec<rpc::Route>,
    pub(super) neighbours: Vec<rpc::Neighbour>,
}

/// Reads the namespace that `netlink` belongs to.
pub(super) async fn scan(netlink: &Handle) -> Result<Found> {
    let mut found = Found::default();
    let mut links = netlink.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(failed("interfaces"))? {
        found.cards.extend(card(&link));
    }
    // In the order in which they were made: CNI makes the pod's main one first.
    found.cards.sort_by_key(|card| card.index);
    let mut addresses = netlink.address().get().execute();
    while let Some(address) = addresses.try_next().await.map_err(failed("addresses"))? {
        let index = address.header.index;
        if let Some(card) = found.cards.iter_mut().find(|card| card.index == index) {
            card.interface.addresses.extend(prefix(&address));
        }
    }
    let names: HashMap<u32, String> = found
        .cards
        .iter()
        .map(|card| (card.index, card.interface.name.clone()))
        .collect();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let mut routes = netlink.route().get(family).execute();
        while let Some(message) = routes.try_next().await.map_err(failed("routes"))? {
            found.routes.extend(route(&message, &names));
        }
    }
    let mut neighbours = netlink.neighbours().get().execute();
    while let Some(message) = neighbours.try_next().await.map_err(failed("neighbours"))? {
        found.neighbours.extend(neighbour(&message, &names));
    }
    Ok(found)
}

pub(super) fn failed(what: &str) -> impl FnOnce(rtnetlink::Error) -> PodError {
    let what = format!("reading the pod's {what}");
    move |error| PodError::io(what)(into_io(error))
}

/// The kernel's error number, where it is one.
pub(super) fn into_io(error: rtnetlink::Error) -> std::io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => std::io::Error::other(other),
    }
}

/// An Ethernet interface that is up, and none of our taps.
fn card(link: &LinkMessage) -> Option<Card> {
    let ethernet = link.header.link_layer_type == LinkLayerType::Ether;
    let flags = link.header.flags;
    if !ethernet || !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut interface = rpc::Interface::default();
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac.clone_from(mac),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            _ => {}
        }
    }
    if interface.name.starts_with(TAP_PREFIX) {
        return None;
    }
    Some(Card {
        index: link.header.index,
        interface,
    })
}

/// An address that others reach the pod under; the guest makes link-local ones itself.
fn prefix(address: &AddressMessage) -> Option<rpc::IpPrefix> {
    if address.header.scope != AddressScope::Universe {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        address.attributes.iter().find_map(wanted)
    };
    // On a point-to-point link the other attribute is the far end.
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    Some(ip_prefix(ip, address.header.prefix_len))
}

fn ip_prefix(ip: IpAddr, prefix_len: u8) -> rpc::IpPrefix {
    rpc::IpPrefix {
        ip: octets(ip),
        prefix_len: prefix_len.into(),
        ..Default::default()
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A route of the main table through one of the cards.
fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<rpc::Route> {
    let header = &message.header;
    let v4 = header.address_family == AddressFamily::Inet;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let any: IpAddr = if v4 {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let mut destination = any;
    let mut route = rpc::Route::default();
    let mut unknown = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.device = names.get(index)?.clone(),
            RouteAttribute::Destination(to) => destination = ip(to)?,
            RouteAttribute::Gateway(gateway) => route.gateway = octets(ip(gateway)?),
            RouteAttribute::PrefSource(source) => route.source = octets(ip(source)?),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            RouteAttribute::MultiPath(_) => unknown = Some("several gateways"),
            RouteAttribute::Encap(_) => unknown = Some("an encapsulation"),
            RouteAttribute::Via(_) => unknown = Some("a gateway of another family"),
            _ => {}
        }
    }
    if let Some(what) = unknown {
        warn!("the pod's route to {destination} has {what}: the guest goes without it");
        return None;
    }
    // The guest's kernel adds those of its link-local addresses itself.
    let link_local = matches!(destination, IpAddr::V6(to) if to.is_unicast_link_local());
    if route.device.is_empty() || link_local {
        return None;
    }
    route.on_link = header.flags.contains(RouteFlags::Onlink);
    let destination = ip_prefix(destination, header.destination_prefix_length);
    route.destination = MessageField::some(destination);
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// A neighbour that somebody set for good; the guest learns the others.
fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<rpc::Neighbour> {
    let device = names.get(&message.header.ifindex)?;
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = rpc::Neighbour {
        device: device.clone(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbour.ip = ip.octets().to_vec();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.ip = ip.octets().to_vec();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = mac.to_vec(),
            _ => {}
        }
    }
    (!neighbour.ip.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
}
