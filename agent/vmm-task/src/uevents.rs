//! Waiting for devices that the host plugs in.
//!
//! The kernel's events are subscribed to before the devices that are there are looked at, so
//! none is missed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::AgentError;
use crate::sys;

/// The kernel's own events; 2 would be those that udev passes on.
const KERNEL_EVENTS: u32 = 1;
/// No event is longer (`UEVENT_BUFFER_SIZE` and its path).
const EVENT_BYTES: usize = 8192;
/// For a bus to find a device that the host has plugged in.
const APPEARANCE: Duration = Duration::from_secs(30);

/// What `find` finds, as soon as it is there; it is asked again after each event of `subsystem`.
///
/// # Errors
/// It does not appear in time; `what` says what was waited for.
pub async fn until<T>(
    subsystem: &str,
    what: &'static str,
    find: impl Fn() -> Option<T>,
) -> Result<T, AgentError> {
    if let Some(found) = find() {
        return Ok(found);
    }
    let failed = AgentError::io("listening for devices");
    let search = async {
        let events = Events::subscribe()?;
        loop {
            if let Some(found) = find() {
                return Ok(found);
            }
            events.next_of(subsystem).await?;
        }
    };
    match tokio::time::timeout(APPEARANCE, search).await {
        Ok(found) => found.map_err(failed),
        Err(_) => Err(AgentError::Deadline(what)),
    }
}

/// The kernel's device events (netlink, `NETLINK_KOBJECT_UEVENT`).
struct Events(AsyncFd<Arc<OwnedFd>>);

impl Events {
    fn subscribe() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
        Ok(Self(sys::polled(Arc::new(socket), Interest::READABLE)?))
    }

    /// Waits for an event of a subsystem's device that is not its removal, or for the loss of
    /// events. Cancel safe.
    async fn next_of(&self, subsystem: &str) -> io::Result<()> {
        let mut event = [0; EVENT_BYTES];
        loop {
            let mut ready = self.0.readable().await?;
            let received = recv(ready.get_inner().as_raw_fd(), &mut event, MsgFlags::empty());
            match received {
                Ok(bytes) if is_of(subsystem, event.get(..bytes).unwrap_or_default()) => {
                    return Ok(());
                }
                // More came than the socket holds.
                Err(Errno::ENOBUFS) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// `add@/devices/.../block/vda`, then `NAME=value`, each ended by a zero byte.
fn is_of(subsystem: &str, event: &[u8]) -> bool {
    let wanted = format!("SUBSYSTEM={subsystem}");
    let mut parts = event.split(|byte| *byte == 0);
    let action = parts.next().unwrap_or_default();
    !action.starts_with(b"remove@") && parts.any(|part| part == wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_from_those_of_others() {
        let add = b"add@/devices/virtio0/block/vda\0ACTION=add\0SUBSYSTEM=block\0";
        assert!(is_of("block", add));
        let gone = b"remove@/devices/virtio0/block/vda\0SUBSYSTEM=block\0";
        assert!(!is_of("block", gone));
        assert!(!is_of("block", b"add@/devices/eth0\0SUBSYSTEM=net\0"));
        assert!(!is_of("block", b""));
    }
}
