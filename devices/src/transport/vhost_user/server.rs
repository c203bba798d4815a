use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::backend::Backend;
use crate::virtio::{Runner, StopToken, VirtioDevice, WorkerId};

/// Serves one device on one socket, to one front-end after the other. Dropping it hangs up
/// and resets the device.
#[derive(Debug)]
pub struct VhostUserServer {
    shared: Arc<Shared>,
    worker: Option<WorkerId>,
    runner: Arc<dyn Runner>,
}

#[derive(Debug)]
struct Shared {
    device: &'static str,
    backend: Arc<Backend>,
    connection: Mutex<Connection>,
}

#[derive(Debug, Default)]
struct Connection {
    /// Of the front-end now served; shut down to wake its thread in the midst of a message.
    socket: Option<UnixStream>,
    closed: bool,
}

impl VhostUserServer {
    /// Serves `device` to whoever connects to `listener`, on a thread of `runner`. `driven`
    /// is the number of queues that the front-end drives: a VMM keeps some devices' last
    /// queue to itself.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn serve(
        device: Box<dyn VirtioDevice>,
        driven: usize,
        listener: UnixListener,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        let kind = device.device_type().name();
        let shared = Arc::new(Shared {
            device: kind,
            backend: Arc::new(Backend::new(device, driven, Arc::clone(&runner))),
            connection: Mutex::default(),
        });
        listener.set_nonblocking(true)?;
        let served = Arc::clone(&shared);
        let worker = runner.spawn(
            &format!("vhost-{kind}"),
            Box::new(move |stop| served.run(&listener, &stop)),
        )?;
        Ok(Self {
            shared,
            worker: Some(worker),
            runner,
        })
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(worker) = self.worker.take() {
            self.runner.join(worker);
        }
        self.shared.backend.reset();
    }
}

impl Shared {
    fn run(&self, listener: &UnixListener, stop: &StopToken) {
        while let Ok(true) = wait(listener.as_fd(), stop) {
            match listener.accept() {
                Ok((socket, _)) => {
                    self.serve(socket, stop);
                    self.backend.reset();
                }
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => {
                    tracing::warn!(device = self.device, %err, "no more VMMs are accepted");
                    return;
                }
            }
        }
    }

    fn serve(&self, socket: UnixStream, stop: &StopToken) {
        let Ok(ready) = socket.try_clone() else {
            return;
        };
        if socket.set_nonblocking(false).is_err() || !self.open(&socket) {
            return;
        }
        let mut requests = BackendReqHandler::from_stream(socket, Arc::clone(&self.backend));
        while let Ok(true) = wait(ready.as_fd(), stop) {
            match requests.handle_request() {
                Ok(()) => {}
                Err(Error::Disconnected) => break,
                Err(err) => {
                    tracing::warn!(device = self.device, %err, "hanging up on the VMM");
                    break;
                }
            }
        }
        self.lock().socket = None;
    }

    /// Notes the connection, unless the server is being dropped.
    fn open(&self, socket: &UnixStream) -> bool {
        let mut connection = self.lock();
        connection.socket = socket.try_clone().ok();
        !connection.closed && connection.socket.is_some()
    }

    fn close(&self) {
        let mut connection = self.lock();
        connection.closed = true;
        if let Some(socket) = &connection.socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until `fd` can be read; false when it is time to stop.
fn wait(fd: BorrowedFd<'_>, stop: &StopToken) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(stop.0.as_fd(), PollFlags::POLLIN),
        PollFd::new(fd, PollFlags::POLLIN),
    ];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(nix::Error::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
    let [stop, _] = &fds;
    Ok(stop.any() != Some(true))
}
