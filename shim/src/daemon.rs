//! The daemon's Controller.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::delete::KILLED;
use crate::rpc::controller as api;
use crate::rpc::controller::controller_client::ControllerClient;

/// A connection to the gRPC server on `socket`, made when it is first used, and again when it
/// was lost.
///
/// # Errors
/// The path cannot be an address.
pub(crate) fn channel(socket: &Path) -> Result<Channel, Status> {
    Endpoint::from_shared(format!("unix://{}", socket.display()))
        .map(|endpoint| endpoint.connect_lazy())
        .map_err(|e| Status::invalid_argument(format!("{}: {e}", socket.display())))
}

/// A client of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    name: &'static str,
    socket: PathBuf,
    client: ControllerClient<Channel>,
}

impl Daemon {
    /// The daemon `name` on `socket`, which need not be there yet. Must be called in a runtime.
    ///
    /// # Errors
    /// The path cannot be an address.
    pub(crate) fn new(name: &'static str, socket: &Path) -> Result<Self, Status> {
        Ok(Self {
            name,
            socket: socket.to_owned(),
            client: ControllerClient::new(channel(socket)?),
        })
    }

    /// Its Controller.
    pub(crate) fn controller(&self) -> ControllerClient<Channel> {
        self.client.clone()
    }

    /// Says what to do where a call found no daemon.
    pub(crate) fn explain(&self, status: Status) -> Status {
        if status.code() != Code::Unavailable {
            return status;
        }
        Status::unavailable(format!(
            "cannot reach {} on {}: start it (systemctl status {} tells why it is not up): {}",
            self.name,
            self.socket.display(),
            self.name,
            status.message()
        ))
    }

    /// Ends a pod and removes everything of it; one that is not there is removed.
    ///
    /// # Errors
    /// The daemon cannot be reached, or cannot remove it.
    pub(crate) async fn shutdown(&self, id: &str) -> Result<(), Status> {
        let request = api::ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            ..Default::default()
        };
        match self.controller().shutdown(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.explain(status)),
        }
    }

    /// Waits for the end of a pod. A daemon that goes away is waited for: only the next one
    /// can tell whether the pod went with it.
    ///
    /// # Errors
    /// The daemon refuses.
    pub(crate) async fn wait(&self, id: &str) -> Result<api::ControllerWaitResponse, Status> {
        loop {
            let request = api::ControllerWaitRequest {
                sandbox_id: id.to_owned(),
                ..Default::default()
            };
            match self.controller().wait(request).await {
                Ok(answer) => return Ok(answer.into_inner()),
                // A connection that breaks while a call waits has many codes, but a cause here.
                Err(status) if status.code() == Code::Unavailable || status.source().is_some() => {
                    self.back().await;
                }
                Err(status) if status.code() == Code::NotFound => {
                    return Ok(api::ControllerWaitResponse {
                        exit_status: KILLED,
                        exited_at: Some(SystemTime::now().into()),
                    });
                }
                Err(status) => return Err(status),
            }
        }
    }

    /// Waits until somebody listens on the daemon's socket.
    pub(crate) async fn back(&self) {
        let watch = watch(&self.socket);
        while tokio::net::UnixStream::connect(&self.socket).await.is_err() {
            let changed = async {
                match &watch {
                    Ok(watch) => changed(watch).await,
                    Err(_) => std::future::pending().await,
                }
            };
            // The file appears a moment before it is listened on, and the folder may go away.
            let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
        }
    }
}

/// How long to go without an event before looking whether the daemon is back.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Watches for files that appear beside `socket`.
fn watch(socket: &Path) -> std::io::Result<AsyncFd<std::os::fd::OwnedFd>> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let dir = socket.parent().unwrap_or_else(|| Path::new("/"));
    let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&fd, dir, events)?;
    // SAFETY: the returned `AsyncFd` owns `fd`, which nobody can take out or replace.
    Ok(unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?)
}

async fn changed(watch: &AsyncFd<std::os::fd::OwnedFd>) {
    if let Ok(mut ready) = watch.readable().await {
        let mut events = [0; 4096];
        while rustix::io::read(ready.get_inner(), &mut events).is_ok_and(|count| count > 0) {}
        ready.clear_ready();
    }
}
