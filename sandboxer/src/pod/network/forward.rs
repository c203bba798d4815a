//! Connections to `localhost` in the pod's namespace, as containerd's port forwarding makes
//! them: carried to what listens in the guest.
//!
//! The namespace's own stack serves the loopback interface, and nothing of the host listens
//! there. One socket takes every connection to it, whatever the port, and each goes on over a
//! stream to the agent.

use std::net::{Ipv4Addr, TcpListener as StdListener};
use std::sync::{Arc, Weak};

use agent_api::stream::Header;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};
use vmm_core::vm::Vm;

use super::super::error::{PodError, Result};
use super::namespace::Namespace;
use super::steer::Steering;

/// Connections that may be open at once.
const MAX_CONNECTIONS: usize = 1024;

/// Forwards until it is dropped.
#[derive(Debug)]
pub(super) struct Forwarding {
    _steering: Steering,
    _accepting: AbortOnDropHandle<()>,
}

/// The socket for every connection, not served yet.
#[derive(Debug)]
pub(super) struct Gate {
    steering: Steering,
    listener: StdListener,
}

impl Gate {
    /// Opens it in `namespace`. Blocks.
    ///
    /// # Errors
    /// The kernel has no `sk_lookup` programs (Linux 5.9), or refuses.
    pub(super) fn open(namespace: &Namespace) -> Result<Self> {
        let failed = || PodError::io("taking connections to the pod's localhost");
        let listener = namespace.run(|_| async {
            // Any port will do: it is not asked for by number.
            StdListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())
        })?;
        listener.set_nonblocking(true).map_err(failed())?;
        let steering = Steering::new(namespace.file(), &listener).map_err(failed())?;
        Ok(Self { steering, listener })
    }

    /// Carries connections to the guest of `vm`, which this does not keep alive.
    ///
    /// # Errors
    /// The async runtime refuses.
    pub(super) fn serve(self, vm: Weak<dyn Vm>, limit: std::time::Duration) -> Result<Forwarding> {
        let listener = TcpListener::from_std(self.listener)
            .map_err(PodError::io("serving the pod's localhost"))?;
        let accepting = tokio::spawn(accept(listener, vm, limit));
        Ok(Forwarding {
            _steering: self.steering,
            _accepting: AbortOnDropHandle::new(accepting),
        })
    }
}

async fn accept(listener: TcpListener, vm: Weak<dyn Vm>, limit: std::time::Duration) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((connection, _)) => {
                    let Some(vm) = vm.upgrade() else { return };
                    connections.spawn(carry(connection, vm, limit));
                }
                Err(e) => {
                    warn!("the pod's localhost is served no more: {e}");
                    return;
                }
            },
        }
    }
}

async fn carry(mut connection: TcpStream, vm: Arc<dyn Vm>, limit: std::time::Duration) {
    let carried = async {
        let port = connection.local_addr()?.port();
        let stream = vm.connect(agent_api::STREAM_PORT, limit).await;
        // A connection must not keep the machine.
        drop(vm);
        let mut stream = stream.map_err(std::io::Error::other)?;
        let header = format!("{}\n", Header::Tcp(port));
        stream.write_all(header.as_bytes()).await?;
        copy_bidirectional(&mut connection, &mut stream).await
    };
    if let Err(e) = carried.await {
        debug!("a forwarded connection ended: {e}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream as StdStream;
    use std::path::Path;

    use harness::netns::NetNs;
    use harness::skip_if;

    use super::*;

    /// Connections to any port come to the one socket, each with its own port, until it goes.
    #[test]
    fn every_port_of_localhost_leads_to_the_gate() {
        skip_if!(NetNs::missing());
        let netns = NetNs::new();
        let namespace = Namespace::open(&netns.path()).unwrap();
        let gate = match Gate::open(&namespace) {
            Ok(gate) => gate,
            Err(e) => return eprintln!("skipped: {}", crate::causes::with_causes(&e)),
        };
        gate.listener.set_nonblocking(false).unwrap();
        for port in [1_u16, 80, 65535] {
            let connect = || StdStream::connect(("127.0.0.1", port)).unwrap();
            let mut client = netns.run(connect);
            let (server, _) = gate.listener.accept().unwrap();
            assert_eq!(server.local_addr().unwrap().port(), port);
            drop(server);
            assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        }
        drop(gate);
        let refused = netns.run(|| StdStream::connect(("127.0.0.1", 80)));
        refused.unwrap_err();
        assert!(Path::new("/proc/self/ns/net").exists());
    }
}
