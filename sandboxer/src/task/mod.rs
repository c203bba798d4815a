//! The Task API of one pod, versions 2 and 3, over ttrpc.

mod convert;
mod metrics;
mod service;
pub(crate) mod streaming;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::shim_async::create_task;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{debug, warn};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::pod::{Pod, PodError, Result};

/// What containerd 2 calls.
const TASK_V3: &str = "containerd.task.v3.Task";

/// What containerd 1.7 and iSulad call: the same messages under another name.
const TASK_V2: &str = "containerd.task.v2.Task";

/// How long calls under way may take to finish when the server closes.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// The server of a pod's Task API.
pub struct TaskServer {
    server: Server,
    socket: PathBuf,
}

impl std::fmt::Debug for TaskServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskServer")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl TaskServer {
    /// Listens on the pod's task socket. The server does not keep the pod alive.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub async fn start(pod: &Arc<Pod>) -> Result<Self> {
        let socket = pod.task_socket();
        let failed = || format!("listening on {}", socket.display());
        // A daemon that died left its own.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(PodError::io(failed()))?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .map_err(PodError::io(failed()))?;
        let service = Arc::new(service::TaskService::new(pod));
        let mut services = create_task(Arc::clone(&service) as _);
        // One implementation under both names.
        if let Some(v2) = create_task(service as _).remove(TASK_V3) {
            services.insert(TASK_V2.to_owned(), v2);
        }
        services.insert(streaming::SERVICE.to_owned(), streaming::service(pod));
        let mut server = Server::new()
            .add_listener(Listener::new(UnixListenerStream::new(listener)))
            .register_service(services);
        server
            .start()
            .await
            .map_err(|e| PodError::io(failed())(std::io::Error::other(e)))?;
        debug!(pod = pod.id(), "task API on {}", socket.display());
        Ok(Self { server, socket })
    }

    /// Stops serving and removes the socket.
    pub async fn close(mut self) {
        if tokio::time::timeout(CLOSE_LIMIT, self.server.shutdown())
            .await
            .is_err()
        {
            debug!("calls on {} were cut off", self.socket.display());
        }
        match std::fs::remove_file(&self.socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                warn!("cannot remove {}: {e}", self.socket.display());
            }
            _ => {}
        }
    }
}
