//! The host kernel's vsock, made into the Unix sockets that our own device has.
//!
//! The guest dials the host port that is its own address: ports of the host are one for all
//! guests, addresses are not.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::dial::dial;
use crate::vsock::{host_port, requested};

/// For a client to say where it wants to go, and for the guest to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts to accept when the host is out of something: nothing tells when it has it.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// Carries streams as long as it lives.
#[derive(Debug)]
pub(super) struct Bridge {
    _runtime: Runtime,
}

impl Bridge {
    /// Serves the guest of this address at `uds`, and has its agent reach `control_port` there.
    pub(super) fn start(uds: &Path, guest_cid: u32, control_port: u32) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("vsock")
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let clients = UnixListener::bind(uds)?;
        let agents = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, guest_cid))?;
        drop(entered);
        runtime.spawn(serve_clients(clients, guest_cid));
        runtime.spawn(serve_agent(agents, guest_cid, host_port(uds, control_port)));
        Ok(Self { _runtime: runtime })
    }
}

async fn serve_clients(clients: UnixListener, guest_cid: u32) {
    loop {
        match clients.accept().await {
            Ok((client, _)) => {
                tokio::spawn(carry(to_guest(client, guest_cid)));
            }
            Err(err) => full(&err).await,
        }
    }
}

async fn to_guest(mut client: UnixStream, guest_cid: u32) -> io::Result<()> {
    let port = timeout(PATIENCE, requested(&mut client)).await??;
    // A client whose connection ends without an answer was refused.
    let guest = VsockStream::connect(VsockAddr::new(guest_cid, port));
    let mut guest = timeout(PATIENCE, guest).await??;
    let answer = format!("OK {}\n", guest.local_addr()?.port());
    client.write_all(answer.as_bytes()).await?;
    copy_bidirectional(&mut client, &mut guest).await.map(drop)
}

async fn serve_agent(agents: VsockListener, guest_cid: u32, host: PathBuf) {
    loop {
        match agents.accept().await {
            Ok((agent, from)) if from.cid() == guest_cid => {
                tokio::spawn(carry(to_host(agent, host.clone())));
            }
            Ok((_, from)) => tracing::warn!(cid = from.cid(), "refused another guest"),
            Err(err) => full(&err).await,
        }
    }
}

async fn to_host(mut agent: VsockStream, host: PathBuf) -> io::Result<()> {
    // While there is no daemon it waits for the next.
    let mut daemon = dial(&host).await?;
    copy_bidirectional(&mut agent, &mut daemon).await.map(drop)
}

async fn carry(stream: impl Future<Output = io::Result<()>>) {
    if let Err(err) = stream.await {
        tracing::debug!(%err, "a stream ended");
    }
}

async fn full(err: &io::Error) {
    tracing::warn!(%err, "no stream can be accepted");
    sleep(FULL_PAUSE).await;
}
