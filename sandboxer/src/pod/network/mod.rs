//! The pod's network: each interface that CNI made in the pod's namespace becomes a card of
//! the guest.
//!
//! | file | idea |
//! |---|---|
//! | `namespace` | entering the namespace |
//! | `scan` | what CNI set up there, for the agent to set up in the guest |
//! | `redirect` | a tap for each interface, frames redirected between the two |

mod namespace;
mod redirect;
mod scan;
#[cfg(test)]
mod tests;

use std::path::Path;

use agent_api::rpc;
use devices::virtio::net::TapDevice;
use rtnetlink::Handle;
use tracing::{info, warn};

use self::namespace::Namespace;
use self::scan::{Card, Found};
use super::error::{PodError, Result};

/// Checks that `path` is a network namespace. Blocks.
///
/// # Errors
/// It is missing or something else.
pub(super) fn check(path: &Path) -> Result<()> {
    Namespace::open(path).map(drop)
}

/// A pod's network, connected to taps; dropping it takes the connection away. Blocks then.
#[derive(Debug)]
pub(super) struct PodNetwork {
    namespace: Namespace,
    found: Found,
    /// What of it redirects frames.
    connected: Vec<u32>,
}

impl PodNetwork {
    /// Reads what CNI set up in the namespace at `path` and makes a tap for each interface.
    /// The taps belong to the caller, in the order of the cards. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be used, has more interfaces than there are `slots`, or the kernel
    /// refuses; nothing is left then.
    pub(super) fn connect(path: &Path, slots: usize) -> Result<(Self, Vec<TapDevice>)> {
        let namespace = Namespace::open(path)?;
        let found = namespace.run(|netlink| async move { scan::scan(&netlink).await })?;
        if found.cards.len() > slots {
            return Err(PodError::invalid(
                "netns_path",
                path.to_string_lossy(),
                format!(
                    "has {} interfaces and the machine {slots} network slots: set vm.net_slots",
                    found.cards.len()
                ),
            ));
        }
        let mut network = Self {
            namespace,
            found,
            connected: Vec::new(),
        };
        let mut taps = Vec::new();
        for card in network.found.cards.clone() {
            // Half a connection is taken away as well.
            network.connected.push(card.index);
            let tap = network
                .namespace
                .run(|netlink| connect(netlink, card.clone()))?;
            info!(
                "{} is connected through {}",
                card.interface.name,
                tap.name()
            );
            taps.push(tap);
        }
        for (slot, card) in network.found.cards.iter_mut().enumerate() {
            card.interface.device = format!("eth{slot}");
        }
        Ok((network, taps))
    }

    /// Tells the guest what to set up.
    pub(super) fn describe(&self, request: &mut rpc::SetupSandboxRequest) {
        let cards = self.found.cards.iter();
        request.interfaces = cards.map(|card| card.interface.clone()).collect();
        request.routes.clone_from(&self.found.routes);
        request.neighbours.clone_from(&self.found.neighbours);
    }
}

async fn connect(netlink: Handle, card: Card) -> Result<TapDevice> {
    redirect::connect(&netlink, &card).await
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        if self.connected.is_empty() {
            return;
        }
        let connected = std::mem::take(&mut self.connected);
        let done = self.namespace.run(|netlink| async move {
            for index in connected {
                redirect::disconnect(&netlink, index).await?;
            }
            Ok(())
        });
        if let Err(e) = done {
            warn!("the pod's network is not cleaned up: {e}");
        }
    }
}
