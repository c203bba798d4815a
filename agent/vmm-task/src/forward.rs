//! Connections that the host opens to what listens in the pod's network.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tracing::debug;

use crate::fd::Fd;

/// Carries bytes between the host's stream and `port` on the loopback interface until both
/// sides have ended. Where nobody listens the stream just ends.
pub async fn tcp(port: u16, mut host: Fd, head: &[u8]) {
    let addresses: [SocketAddr; 2] = [
        (Ipv4Addr::LOCALHOST, port).into(),
        (Ipv6Addr::LOCALHOST, port).into(),
    ];
    let carried = async {
        let mut guest = TcpStream::connect(&addresses[..]).await?;
        guest.write_all(head).await?;
        copy_bidirectional(&mut host, &mut guest).await
    };
    if let Err(e) = carried.await {
        debug!(port, "forwarding ended: {e}");
    }
}
