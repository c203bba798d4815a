//! What CNI changes in a pod's namespace while the pod runs.

use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::MulticastGroup;
use tokio::runtime;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, warn};

use super::namespace::Namespace;
use super::{Change, PodNetwork};
use crate::causes::with_causes;
use crate::pod::Pod;
use crate::pod::error::{PodError, Result};

/// CNI makes several changes in a row; they are looked at once this has passed without one.
const QUIET: Duration = Duration::from_millis(20);

/// They are looked at after so many in any case.
const MOST: usize = 256;

/// What a change of which a pod may have to hear.
const GROUPS: [MulticastGroup; 6] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
];

/// Keeps a running pod's network as CNI has it. The network goes with it.
#[derive(Debug)]
pub(in crate::pod) struct Follower {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Follower {
    /// Follows the namespace of `network`, of `pod`, until the follower is ended.
    pub(in crate::pod) fn start(pod: &Arc<Pod>, network: PodNetwork) -> Self {
        let stop = CancellationToken::new();
        let work = follow(Arc::downgrade(pod), network, stop.clone());
        Self {
            task: tokio::spawn(work.instrument(pod.span())),
            stop,
        }
    }

    /// Returns when the network is gone.
    pub(in crate::pod) async fn end(self) {
        self.stop.cancel();
        let _ = self.task.await;
    }
}

async fn follow(pod: Weak<Pod>, mut network: PodNetwork, stop: CancellationToken) {
    let mut changes = changes(&network.namespace)
        .inspect_err(|e| warn!("changes of the network go unnoticed: {}", with_causes(e)))
        .ok();
    loop {
        // At once: something may have changed before there was a connection.
        let Some(back) = refresh(&pod, network).await else {
            return;
        };
        network = back;
        tokio::select! {
            () = stop.cancelled() => break,
            () = next(&mut changes) => {}
        }
    }
    let _ = spawn_blocking(move || drop(network)).await;
}

/// Waits for a change, and for those that follow it.
async fn next(changes: &mut Option<Changes>) {
    let Some(Changes { messages, .. }) = changes else {
        return std::future::pending().await;
    };
    if messages.next().await.is_none() {
        // The namespace's last connection; nothing changes any more that matters.
        std::future::pending::<()>().await;
    }
    let mut more = pin!(messages.take(MOST));
    while let Ok(Some(_)) = timeout(QUIET, more.next()).await {}
}

/// Brings machine and guest up to date. Nothing comes back when this process ends.
async fn refresh(pod: &Weak<Pod>, mut network: PodNetwork) -> Option<PodNetwork> {
    let before = network.describe().clone();
    let (network, found) = spawn_blocking(move || {
        let found = network.refresh();
        (network, found)
    })
    .await
    .ok()?;
    let done = match found {
        Ok(changes) => apply(pod, &network, changes, network.describe() != &before).await,
        Err(e) => Err(e),
    };
    if let Err(e) = done {
        warn!("the pod's network is not up to date: {}", with_causes(&e));
    }
    Some(network)
}

async fn apply(
    pod: &Weak<Pod>,
    network: &PodNetwork,
    changes: Vec<Change>,
    differs: bool,
) -> Result<()> {
    let Some(pod) = pod.upgrade() else {
        return Ok(());
    };
    if changes.is_empty() && !differs {
        return Ok(());
    }
    pod.note_network(network);
    let machine = pod.machine()?;
    // The guest may use a card that is being unplugged for so long.
    let unplug = pod.environment.timeouts.agent_call;
    for change in changes {
        let done = match change {
            Change::Unplug(slot) => machine.vm.detach_nic(slot, unplug).await,
            Change::Plug(slot, tap) => machine.vm.attach_nic(slot, tap).await,
        };
        done.map_err(|e| pod.vm_error(e))?;
    }
    debug!("the network has changed");
    pod.describe_for_next_daemon().await;
    machine
        .agent
        .update_network(network.describe().clone())
        .await
        .map_err(PodError::from)
}

/// The kernel's news of a namespace.
struct Changes {
    messages: UnboundedReceiver<(
        rtnetlink::packet_core::NetlinkMessage<rtnetlink::packet_route::RouteNetlinkMessage>,
        rtnetlink::sys::SocketAddr,
    )>,
    /// By itself it would stay until there are more.
    _connection: AbortOnDropHandle<()>,
}

/// Listens from this process's own runtime.
fn changes(namespace: &Namespace) -> Result<Changes> {
    let runtime = runtime::Handle::current();
    namespace.enter(|| {
        let _runtime = runtime.enter();
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&GROUPS)
            .map_err(PodError::io("listening for changes of the network"))?;
        Ok(Changes {
            messages,
            _connection: AbortOnDropHandle::new(tokio::spawn(connection)),
        })
    })
}
