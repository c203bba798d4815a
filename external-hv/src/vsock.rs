//! Ports of host and guest as Unix sockets: the hybrid model that our device, Firecracker and
//! Cloud Hypervisor share. The streams need nothing of the daemon's process.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::{ExitReason, GuestListener, GuestStream, VmError};

/// "CONNECT 4294967295\n" has 19 bytes.
const MAX_LINE: usize = 32;

/// Connects to a port of the guest through the device's socket.
///
/// # Errors
/// [`VmError::Refused`] when nothing listens there, or the deadline passed.
pub async fn connect(socket: &Path, port: u32, deadline: Duration) -> Result<UnixStream, VmError> {
    match timeout(deadline, handshake(socket, port)).await {
        Ok(Ok(Some(stream))) => Ok(stream),
        Ok(Ok(None)) => Err(VmError::Refused(port)),
        Ok(Err(source)) => Err(VmError::Io {
            what: format!("cannot connect to guest port {port}"),
            source,
        }),
        Err(_) => Err(VmError::Deadline {
            what: "connecting to the guest",
            limit: deadline,
        }),
    }
}

/// `None` when the guest refuses.
async fn handshake(socket: &Path, port: u32) -> io::Result<Option<UnixStream>> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = format!("CONNECT {port}\n");
    stream.write_all(request.as_bytes()).await?;
    match line(&mut stream).await {
        Ok(answer) if answer.starts_with(b"OK ") => Ok(Some(stream)),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the vsock device does not answer as it should",
        )),
        Err(err) if is_hang_up(&err) => Ok(None),
        Err(err) => Err(err),
    }
}

/// The guest port that a client of a device's socket asks for.
pub(crate) async fn requested(client: &mut UnixStream) -> io::Result<u32> {
    let line = line(client).await?;
    let port = std::str::from_utf8(&line).ok();
    let port = port.and_then(|line| line.strip_prefix("CONNECT ")?.trim_end().parse().ok());
    port.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a client that does not CONNECT"))
}

/// Not a byte further than the line: what follows is the peer's.
async fn line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(MAX_LINE);
    while line.len() < MAX_LINE {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    Ok(line)
}

fn is_hang_up(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

/// Where the device connects to when the guest connects to `port` of the host.
#[must_use]
pub fn host_port(socket: &Path, port: u32) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(format!("_{port}"));
    path.into()
}

/// Streams of the guest to one port; its socket goes with it.
#[derive(Debug)]
pub struct PortListener {
    listener: UnixListener,
    path: PathBuf,
    port: u32,
    ports: Ports,
    exited: watch::Receiver<Option<ExitReason>>,
}

/// The host ports of a VM that have a listener.
#[derive(Clone, Debug, Default)]
pub struct Ports(Arc<Mutex<BTreeSet<u32>>>);

impl Ports {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortListener {
    /// Listens for the device of `socket`, until the VM has exited. A socket that an earlier
    /// daemon left is replaced.
    ///
    /// # Errors
    /// The port has a listener, or the socket cannot be bound.
    pub fn bind(
        socket: &Path,
        port: u32,
        ports: &Ports,
        exited: watch::Receiver<Option<ExitReason>>,
    ) -> Result<Self, VmError> {
        let path = host_port(socket, port);
        // Until it is bound, so that no other takes its file away.
        let mut taken = ports.lock();
        let bind = || {
            if taken.contains(&port) {
                return Err(io::Error::from(io::ErrorKind::AddrInUse));
            }
            match std::fs::remove_file(&path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            // Also tells whoever waits for it that it listens.
            std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = bind().map_err(|source| VmError::Io {
            what: format!("cannot listen on {}", path.display()),
            source,
        })?;
        taken.insert(port);
        Ok(Self {
            listener,
            path,
            port,
            ports: ports.clone(),
            exited,
        })
    }
}

#[async_trait]
impl GuestListener for PortListener {
    async fn accept(&mut self) -> Option<Box<dyn GuestStream>> {
        loop {
            let accepted = tokio::select! {
                biased;
                accepted = self.listener.accept() => accepted,
                _ = self.exited.wait_for(Option::is_some) => return None,
            };
            match accepted {
                Ok((stream, _)) => return Some(Box::new(stream)),
                Err(err) => tracing::warn!(%err, "dropped a stream from the guest"),
            }
        }
    }
}

impl Drop for PortListener {
    fn drop(&mut self) {
        let mut taken = self.ports.lock();
        let _ = std::fs::remove_file(&self.path);
        taken.remove(&self.port);
    }
}
