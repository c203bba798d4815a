//! The pod's network: cards, addresses, routes and neighbours, set over netlink.
//!
//! What the host found in the pod's namespace is set as it is: addresses without the routes
//! that the kernel adds on its own, then every route. When something changes there the host
//! sends all of it again, and the difference is applied.

mod messages;
mod netlink;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

use agent_api::rpc;
use agent_api::rpc::{Interface, IpPrefix, Neighbour, Route};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use tracing::warn;

use self::netlink::Netlink;
use crate::error::AgentError;

/// The pod's network as it was set last.
#[derive(Debug, Default)]
pub struct Network {
    /// By the name of the machine's slot. A card that is gone keeps its number.
    cards: BTreeMap<String, Card>,
    set: rpc::Network,
}

#[derive(Debug)]
struct Card {
    index: u32,
    /// Nothing for one that is unplugged.
    set: Option<Interface>,
}

impl Network {
    /// Makes the guest's network what `wanted` says.
    ///
    /// # Errors
    /// Names what cannot be set; the rest of a network that comes after it is not set then.
    pub fn apply(&mut self, wanted: &rpc::Network) -> Result<(), AgentError> {
        if *wanted == self.set {
            return Ok(());
        }
        let mut netlink = Netlink::open().map_err(AgentError::io("opening netlink"))?;
        let before = std::mem::take(&mut self.set);
        // Before addresses move to another card.
        for (device, card) in &mut self.cards {
            let stays = wanted.interfaces.iter().any(|new| new.device == *device);
            if let (Some(old), false) = (&card.set, stays) {
                take_down(&mut netlink, card.index, old);
                card.set = None;
            }
        }
        for interface in &wanted.interfaces {
            self.apply_interface(&mut netlink, interface)?;
        }
        for route in gone(&before.routes, &wanted.routes) {
            if let Ok(index) = self.index(&route.device) {
                let (message, what) = messages::route_message(route, index)?;
                forget(
                    netlink.request(RouteNetlinkMessage::DelRoute(message), 0),
                    &what,
                );
            }
        }
        self.add_routes(&mut netlink, &before.routes, &wanted.routes)?;
        for old in gone(&before.neighbours, &wanted.neighbours) {
            if let Ok(index) = self.index(&old.device) {
                let message = messages::neighbour_message(old, index)?;
                let request = RouteNetlinkMessage::DelNeighbour(message);
                forget(netlink.request(request, 0), "a neighbour");
            }
        }
        for neighbour in gone(&wanted.neighbours, &before.neighbours) {
            self.add_neighbour(&mut netlink, neighbour)?;
        }
        self.set = wanted.clone();
        Ok(())
    }

    fn apply_interface(
        &mut self,
        netlink: &mut Netlink,
        interface: &Interface,
    ) -> Result<(), AgentError> {
        let known = self.cards.get(&interface.device);
        let index = match known {
            Some(card) => card.index,
            None => slot_index(&interface.device)?,
        };
        let old = known.and_then(|card| card.set.clone()).unwrap_or_default();
        let mut without = interface.clone();
        without.addresses.clone_from(&old.addresses);
        if without != old {
            self.make_way(netlink, &interface.name, index)?;
            let message = messages::link(interface, index)?;
            netlink
                .request(RouteNetlinkMessage::SetLink(message), 0)
                .map_err(AgentError::io(format!("network card {}", interface.device)))?;
        }
        for address in gone(&old.addresses, &interface.addresses) {
            remove_address(netlink, index, address);
        }
        for address in gone(&interface.addresses, &old.addresses) {
            let (ip, prefix_len) = messages::prefix("interfaces.addresses", address)?;
            let message = messages::address_message(index, ip, prefix_len);
            netlink
                .request(
                    RouteNetlinkMessage::NewAddress(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
                .map_err(AgentError::io(format!("address {ip}/{prefix_len}")))?;
        }
        let card = Card {
            index,
            set: Some(interface.clone()),
        };
        self.cards.insert(interface.device.clone(), card);
        Ok(())
    }

    /// A card of another slot that nobody has set up yet may have the name that is wanted.
    fn make_way(
        &mut self,
        netlink: &mut Netlink,
        name: &str,
        index: u32,
    ) -> Result<(), AgentError> {
        let holder = match if_nametoindex(name) {
            Ok(holder) if holder != index => holder,
            _ => return Ok(()),
        };
        let mut message = LinkMessage::default();
        message.header.index = holder;
        let spare = format!("slot{holder}");
        message.attributes.push(LinkAttribute::IfName(spare));
        netlink
            .request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(AgentError::io(format!("the name {name:?} is taken")))?;
        if !self.cards.values().any(|card| card.index == holder) {
            // The kernel's name was its slot's.
            let card = Card {
                index: holder,
                set: None,
            };
            self.cards.insert(name.to_owned(), card);
        }
        Ok(())
    }

    fn add_routes(
        &self,
        netlink: &mut Netlink,
        before: &[Route],
        wanted: &[Route],
    ) -> Result<(), AgentError> {
        // A gateway has to be reachable when its route is added. Routes that stay are added
        // again: the kernel drops them with an address or a link.
        let (through, direct): (Vec<_>, Vec<_>) =
            wanted.iter().partition(|route| !route.gateway.is_empty());
        for route in direct.into_iter().chain(through) {
            let (message, what) = messages::route_message(route, self.index(&route.device)?)?;
            // Two cards on one network have a route to it each.
            let added = netlink.request(
                RouteNetlinkMessage::NewRoute(message),
                NLM_F_CREATE | NLM_F_APPEND,
            );
            match added {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) if before.contains(route) => warn!("{what} is not there again: {e}"),
                other => other.map_err(AgentError::io(what))?,
            }
        }
        Ok(())
    }

    fn add_neighbour(
        &self,
        netlink: &mut Netlink,
        neighbour: &Neighbour,
    ) -> Result<(), AgentError> {
        let message = messages::neighbour_message(neighbour, self.index(&neighbour.device)?)?;
        netlink
            .request(
                RouteNetlinkMessage::NewNeighbour(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .map_err(AgentError::io("a neighbour"))
    }

    /// Number of the card that is called `name`.
    fn index(&self, name: &str) -> Result<u32, AgentError> {
        let called = |card: &&Card| card.set.as_ref().is_some_and(|set| set.name == name);
        match self.cards.values().find(called) {
            Some(card) => Ok(card.index),
            None => slot_index(name),
        }
    }
}

/// What is in `old` and not in `new`.
fn gone<'a, T: PartialEq>(old: &'a [T], new: &'a [T]) -> impl Iterator<Item = &'a T> {
    old.iter().filter(move |item| !new.contains(item))
}

fn slot_index(device: &str) -> Result<u32, AgentError> {
    if_nametoindex(device).map_err(|e| AgentError::io(format!("network card {device:?}"))(e.into()))
}

/// Its routes go with the link.
fn take_down(netlink: &mut Netlink, index: u32, card: &Interface) {
    for address in &card.addresses {
        remove_address(netlink, index, address);
    }
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    forget(
        netlink.request(RouteNetlinkMessage::SetLink(message), 0),
        &card.name,
    );
}

fn remove_address(netlink: &mut Netlink, index: u32, address: &IpPrefix) {
    // Set before, so it can be read.
    if let Ok((ip, prefix_len)) = messages::prefix("interfaces.addresses", address) {
        let message = messages::address_message(index, ip, prefix_len);
        let request = RouteNetlinkMessage::DelAddress(message);
        forget(netlink.request(request, 0), &format!("{ip}/{prefix_len}"));
    }
}

/// What is gone already is as it should be.
fn forget(result: io::Result<()>, what: &str) {
    let Err(e) = result else { return };
    let gone = [
        Errno::ESRCH,
        Errno::ENOENT,
        Errno::EADDRNOTAVAIL,
        Errno::ENODEV,
    ];
    if !gone
        .iter()
        .any(|errno| e.raw_os_error() == Some(*errno as i32))
    {
        warn!("{what} stays: {e}");
    }
}
