//! The pod's network: each interface of the pod's namespace becomes a card of the guest.
//!
//! | file | idea |
//! |---|---|
//! | `namespace` | entering the namespace |
//! | `scan` | what CNI set up there, for the agent to set up in the guest |
//! | `redirect` | a tap for each interface, frames redirected between the two |
//! | `follow` | what CNI changes while the pod runs |
//! | `forward` | connections to `localhost` there, carried into the guest |
//! | `steer` | the kernel gives them all to one socket |

mod follow;
mod forward;
mod namespace;
mod redirect;
mod scan;
mod steer;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use agent_api::rpc;
use devices::virtio::net::TapDevice;
use rtnetlink::Handle;
use tracing::{info, warn};
use vmm_core::vm::Vm;

pub(super) use self::follow::Follower;
use self::forward::{Forwarding, Gate};
use self::namespace::Namespace;
use self::scan::{Card, Found};
use super::error::{PodError, Result};
use crate::causes::with_causes;

/// Checks that `path` is a network namespace. Blocks.
///
/// # Errors
/// It is missing or something else.
pub(super) fn check(path: &Path) -> Result<()> {
    Namespace::open(path).map(drop)
}

/// What has to happen to a network slot of the machine.
#[derive(Debug)]
pub(super) enum Change {
    /// The interface of this slot is gone.
    Unplug(usize),
    /// This is the new interface's tap.
    Plug(usize, TapDevice),
}

/// A pod's network, connected to taps; dropping it takes the connection away. Blocks then.
#[derive(Debug)]
pub(super) struct PodNetwork {
    namespace: Namespace,
    /// By slot.
    cards: Vec<Option<Card>>,
    described: rpc::Network,
    gate: Option<Gate>,
    forwarding: Option<Forwarding>,
}

impl PodNetwork {
    /// Reads what CNI set up in the namespace at `path` and makes a tap for each interface.
    /// The taps belong to the caller, in the order of the slots. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be used, has more interfaces than there are `slots`, or the kernel
    /// refuses; nothing is left then.
    pub(super) fn connect(path: &Path, slots: usize) -> Result<(Self, Vec<TapDevice>)> {
        let mut network = Self {
            namespace: Namespace::open(path)?,
            cards: vec![None; slots],
            described: rpc::Network::default(),
            gate: None,
            forwarding: None,
        };
        let found = network.scan()?;
        if found.cards.len() > slots {
            return Err(PodError::invalid(
                "netns_path",
                path.to_string_lossy(),
                too_many(found.cards.len(), slots),
            ));
        }
        network.open_gate();
        let changes = network.take_over(&found)?;
        let taps = changes.into_iter().filter_map(|change| match change {
            Change::Plug(_, tap) => Some(tap),
            Change::Unplug(_) => None,
        });
        let taps = taps.collect();
        Ok((network, taps))
    }

    fn open_gate(&mut self) {
        match Gate::open(&self.namespace) {
            Ok(gate) => self.gate = Some(gate),
            Err(e) => warn!("no port forwarding: {}", with_causes(&e)),
        }
    }

    /// Carries what connects to `localhost` in the namespace into the guest of `vm`; opening a
    /// stream to it may take `limit`.
    pub(super) fn forward(&mut self, vm: Weak<dyn Vm>, limit: Duration) {
        let gate = self.gate.take().map(|gate| gate.serve(vm, limit));
        match gate.transpose() {
            Ok(forwarding) => self.forwarding = forwarding,
            Err(e) => warn!("no port forwarding: {}", with_causes(&e)),
        }
    }

    /// The interface of each slot by its number, for the next daemon; 0 for none.
    pub(super) fn connected(&self) -> Vec<u32> {
        let index = |card: &Option<Card>| card.as_ref().map_or(0, |card| card.index);
        self.cards.iter().map(index).collect()
    }

    /// Owns the connection that an earlier daemon made: the interface of each slot. Blocks.
    ///
    /// # Errors
    /// The namespace is gone, and the connection with it.
    pub(super) fn adopt(path: &Path, connected: &[u32]) -> Result<Self> {
        let mut network = Self {
            namespace: Namespace::open(path)?,
            cards: Vec::new(),
            described: rpc::Network::default(),
            gate: None,
            forwarding: None,
        };
        let found = network.scan()?;
        for index in connected {
            // One that is gone is noticed when the namespace is followed.
            let interface = found.cards.iter().find(|card| card.index == *index);
            let card = interface.cloned().unwrap_or_else(|| Card {
                index: *index,
                interface: rpc::Interface::default(),
            });
            network.cards.push((*index != 0).then_some(card));
        }
        network.described = network.description(&found);
        network.open_gate();
        Ok(network)
    }

    /// Reads the namespace again; what the machine has to do about it. Blocks.
    ///
    /// # Errors
    /// As [`Self::connect`], but interfaces for which there is no slot are left out.
    pub(super) fn refresh(&mut self) -> Result<Vec<Change>> {
        let found = self.scan()?;
        self.take_over(&found)
    }

    /// What the guest has to set up.
    pub(super) fn describe(&self) -> &rpc::Network {
        &self.described
    }

    fn scan(&self) -> Result<Found> {
        self.namespace
            .run(|netlink| async move { scan::scan(&netlink).await })
    }

    fn take_over(&mut self, found: &Found) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for (slot, place) in self.cards.iter_mut().enumerate() {
            let Some(card) = place else { continue };
            match found.cards.iter().find(|found| found.index == card.index) {
                Some(found) => card.interface.clone_from(&found.interface),
                None => {
                    info!("{} is gone", card.interface.name);
                    *place = None;
                    changes.push(Change::Unplug(slot));
                }
            }
        }
        let known = |card: &Card| {
            let mut known = self.cards.iter().flatten();
            known.any(|known| known.index == card.index)
        };
        let new: Vec<_> = found.cards.iter().filter(|card| !known(card)).collect();
        for card in new {
            let Some(slot) = self.cards.iter().position(Option::is_none) else {
                let slots = self.cards.len();
                let what = too_many(found.cards.len(), slots);
                warn!("{} is left out: the namespace {what}", card.interface.name);
                continue;
            };
            let tap = self.plug(slot, card.clone())?;
            changes.push(Change::Plug(slot, tap));
        }
        self.described = self.description(found);
        Ok(changes)
    }

    fn plug(&mut self, slot: usize, card: Card) -> Result<TapDevice> {
        let name = card.interface.name.clone();
        // Half a connection is taken away as well.
        if let Some(place) = self.cards.get_mut(slot) {
            *place = Some(card.clone());
        }
        let tap = self.namespace.run(|netlink| connect(netlink, card))?;
        info!("{name} is connected through {}", tap.name());
        Ok(tap)
    }

    fn description(&self, found: &Found) -> rpc::Network {
        let mut interfaces = Vec::new();
        for (slot, card) in self.cards.iter().enumerate() {
            if let Some(card) = card
                && !card.interface.name.is_empty()
            {
                interfaces.push(rpc::Interface {
                    device: format!("eth{slot}"),
                    ..card.interface.clone()
                });
            }
        }
        let plugged = |device: &str| interfaces.iter().any(|card| card.name == device);
        let routes = found.routes.iter();
        let routes = routes.filter(|route| plugged(&route.device)).cloned();
        let neighbours = found.neighbours.iter();
        let neighbours = neighbours.filter(|neighbour| plugged(&neighbour.device));
        rpc::Network {
            routes: routes.collect(),
            neighbours: neighbours.cloned().collect(),
            interfaces,
            ..Default::default()
        }
    }
}

fn too_many(cards: usize, slots: usize) -> String {
    format!("has {cards} interfaces and the machine {slots} network slots: set vm.net_slots")
}

async fn connect(netlink: Handle, card: Card) -> Result<TapDevice> {
    redirect::connect(&netlink, &card).await
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        let connected: Vec<_> = self.cards.drain(..).flatten().collect();
        if connected.is_empty() {
            return;
        }
        let done = self.namespace.run(|netlink| async move {
            for card in connected {
                redirect::disconnect(&netlink, card.index).await?;
            }
            Ok(())
        });
        if let Err(e) = done {
            warn!("the pod's network is not cleaned up: {e}");
        }
    }
}
