//! Ports of host and guest as Unix sockets: the hybrid model that our device, Firecracker and
//! Cloud Hypervisor share. The streams need nothing of the daemon's process.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;
use vmm_core::vm::{ExitReason, GuestListener, GuestStream, VmError};

/// "OK 4294967295\n" has 14 bytes.
const MAX_ANSWER: usize = 32;

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
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    // Not a byte further than the line: what follows is the guest's.
    loop {
        let byte = match stream.read_u8().await {
            Ok(byte) => byte,
            Err(err) if is_hang_up(&err) => return Ok(None),
            Err(err) => return Err(err),
        };
        if byte == b'\n' {
            break;
        }
        answer.push(byte);
        if answer.len() >= MAX_ANSWER {
            break;
        }
    }
    if answer.starts_with(b"OK ") {
        return Ok(Some(stream));
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "the vsock device does not answer as it should",
    ))
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
            UnixListener::bind(&path)
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
