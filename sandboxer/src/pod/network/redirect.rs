//! Taps, and what connects each of them to an interface of the pod's namespace.
//!
//! Every frame that arrives at one of the two is sent out of the other, by a filter on its
//! ingress queue. The namespace's own network stack sees none of them, so that addresses
//! and routes may stay where CNI put them.

use devices::virtio::net::TapDevice;
use nix::errno::Errno;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage,
};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkUnspec};
use tracing::debug;

use super::super::error::{PodError, Result};
use super::scan::{Card, into_io};

/// Parent of a filter on what arrives, as `tc` writes `ffff:`.
const INGRESS: u32 = 0xffff_0000;

/// How names of taps begin; the rest is the number of their interface.
pub(super) const TAP_PREFIX: &str = "tap_kua_";

/// Everything, `ETH_P_ALL` in the byte order of the wire.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// Makes a tap in this thread's namespace and connects it to `card`.
pub(super) async fn connect(netlink: &Handle, card: &Card) -> Result<TapDevice> {
    let name = format!("{TAP_PREFIX}{}", card.index);
    let failed = |what: &'static str| {
        let name = name.clone();
        move |error| PodError::io(format!("{what} {name}"))(into_io(error))
    };
    let tap = TapDevice::open(&name, 1)
        .map_err(|e| PodError::io(format!("making {name}"))(std::io::Error::other(e)))?;
    let index = nix::net::if_::if_nametoindex(name.as_str())
        .map_err(PodError::io(format!("looking up {name}")))?;
    quiet(netlink, index).await;
    let up = LinkUnspec::new_with_index(index)
        .mtu(card.interface.mtu)
        .up()
        .build();
    netlink
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed("setting up"))?;
    for (from, to) in [(card.index, index), (index, card.index)] {
        let from = i32::try_from(from)
            .map_err(|e| PodError::io("numbering an interface")(std::io::Error::other(e)))?;
        add_queue(netlink, from)
            .await
            .map_err(failed("redirecting"))?;
        netlink
            .traffic_filter(from)
            .add()
            .parent(INGRESS)
            .priority(1)
            .protocol(ALL_PROTOCOLS)
            .redirect(to)
            .map_err(failed("redirecting"))?
            .execute()
            .await
            .map_err(failed("redirecting"))?;
    }
    Ok(tap)
}

/// The namespace's stack is not to speak through the tap: no link-local address of its own.
async fn quiet(netlink: &Handle, index: u32) {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
        .attributes
        .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
        )]));
    if let Err(e) = netlink.link().set(message).execute().await {
        debug!("the tap keeps its own addresses: {e}");
    }
}

async fn add_queue(netlink: &Handle, index: i32) -> std::result::Result<(), rtnetlink::Error> {
    let added = netlink.qdisc().add(index).ingress().execute().await;
    match added {
        // What a daemon that died left: its filters go with it.
        Err(e) if is(&e, Errno::EEXIST) => {
            delete_queue(netlink, index).await?;
            netlink.qdisc().add(index).ingress().execute().await
        }
        other => other,
    }
}

async fn delete_queue(netlink: &Handle, index: i32) -> std::result::Result<(), rtnetlink::Error> {
    let mut delete = netlink.qdisc().del(index);
    delete.message_mut().header.parent = TcHandle::INGRESS;
    delete.execute().await
}

/// Takes the redirection off an interface, if that is still there.
pub(super) async fn disconnect(netlink: &Handle, index: u32) -> Result<()> {
    let index = i32::try_from(index).unwrap_or_default();
    match delete_queue(netlink, index).await {
        Ok(()) => Ok(()),
        // The interface, or its queue, went first.
        Err(e) if is(&e, Errno::ENODEV) || is(&e, Errno::ENOENT) || is(&e, Errno::EINVAL) => Ok(()),
        Err(e) => Err(PodError::io("taking a redirection away")(into_io(e))),
    }
}

fn is(error: &rtnetlink::Error, errno: Errno) -> bool {
    matches!(
        error,
        rtnetlink::Error::NetlinkError(message) if message.raw_code() == -(errno as i32)
    )
}
