//! The daemon as a value: start it, use its address, shut it down.

pub mod daemon;
mod folder;
mod socket;
#[cfg(test)]
mod tests;
mod watchdog;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use watchdog::answer_watchdog;

use self::folder::DaemonFolder;
use self::socket::ListenSocket;
use crate::backend::SandboxBackend;
use crate::backend::external::ExternalBackend;
use crate::backend::vmm::{BackendError, VmmBackend};
use crate::config::{Config, Mode};
use crate::controller::{AdminService, ControllerService, Pods};
use crate::events::EventSink;
use crate::pod::{PodEnvironment, PodError, record};
use crate::rpc::controller::controller_server::ControllerServer;
use crate::rpc::pods::pods_server::PodsServer;

/// Where `vmm-sandboxer` listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "/run/vmm-sandboxer.sock";

/// Where `vmm-sandboxer` keeps its pods unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/kuasar-vmm";

/// Where `wasm-sandboxer` listens unless told otherwise.
pub const DEFAULT_WASM_LISTEN: &str = "/run/wasm-sandboxer.sock";

/// Where `wasm-sandboxer` keeps its pods unless told otherwise.
pub const DEFAULT_WASM_DIR: &str = "/run/kuasar-wasm";

/// Where `quark-sandboxer` listens unless told otherwise.
pub const DEFAULT_QUARK_LISTEN: &str = "/run/quark-sandboxer.sock";

/// Where `quark-sandboxer` keeps its pods unless told otherwise.
pub const DEFAULT_QUARK_DIR: &str = "/run/kuasar-quark";

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Socket of the Controller.
    pub listen: PathBuf,
    /// Folder for pods; belongs to one daemon at a time.
    pub dir: PathBuf,
    /// Everything else.
    pub config: Config,
    /// Let pods go on when the daemon ends, where machines can: the next one takes them over.
    pub pods_outlive: bool,
    /// Makes the machines; `None`: what the configuration says.
    pub backend: Option<Arc<dyn SandboxBackend>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            listen: PathBuf::from(DEFAULT_LISTEN),
            dir: PathBuf::from(DEFAULT_DIR),
            config: Config::default(),
            pods_outlive: false,
            backend: None,
        }
    }
}

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket is taken by a living process.
    #[error("{0} is in use by a running daemon: stop it, or choose another socket with --listen")]
    SocketInUse(PathBuf),
    /// Another daemon owns the folder.
    #[error("{0} belongs to a running daemon: stop it, or choose another folder with --dir")]
    FolderInUse(PathBuf),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Machines cannot be made on this host.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// What an earlier daemon left cannot be cleaned up.
    #[error(transparent)]
    Stale(#[from] PodError),
}

impl ServerError {
    /// What to do about it, unless the message says so.
    #[must_use]
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::Backend(error) => error.fix(),
            Self::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Some("run as root")
            }
            _ => None,
        }
    }

    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// The daemon.
#[derive(Clone, Copy, Debug)]
pub struct Server;

impl Server {
    /// Starts a daemon in this process: probes the host, cleans up after an earlier daemon,
    /// then listens.
    ///
    /// # Errors
    /// The folder or socket belongs to another daemon, or the host cannot run machines.
    pub async fn start(options: ServerOptions) -> Result<RunningServer, ServerError> {
        let folder = DaemonFolder::claim(&options.dir)?;
        allow_many_files();
        for warning in &options.config.warnings {
            warn!("{warning}");
        }
        let backend = match options.backend {
            Some(backend) => backend,
            None => make_backend(&options.config, options.pods_outlive).await?,
        };
        let timeouts = if backend.slow_kernel() {
            options.config.timeouts.for_slow_host()
        } else {
            options.config.timeouts.clone()
        };
        let events = options
            .config
            .events
            .containerd
            .as_deref()
            .map(EventSink::to_containerd)
            .unwrap_or_default();
        let dir = options.dir;
        let pods = Arc::new(Pods::new(Arc::new(PodEnvironment {
            dir: dir.clone(),
            backend,
            vm: options.config.vm,
            timeouts,
            events,
        })));
        pods.recover().await;
        let (stale, known) = (dir, pods.ids());
        tokio::task::spawn_blocking(move || record::clean_stale(&stale, &known))
            .await
            .map_err(|e| ServerError::io("cleaning up")(e.into()))??;
        let (listener, socket) = ListenSocket::bind(&options.listen).await?;
        let stop = CancellationToken::new();
        let serving = tonic::transport::Server::builder()
            .add_service(ControllerServer::new(ControllerService::new(Arc::clone(
                &pods,
            ))))
            .add_service(PodsServer::new(AdminService::new(Arc::clone(&pods))))
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        info!("listening on {}", options.listen.display());
        Ok(RunningServer {
            address: options.listen,
            pods,
            stop,
            serving: tokio::spawn(serving),
            socket,
            folder,
        })
    }
}

/// A daemon that serves. Dropping it ends its machines but waits for nothing; use
/// [`RunningServer::shutdown`].
#[derive(Debug)]
pub struct RunningServer {
    address: PathBuf,
    pods: Arc<Pods>,
    stop: CancellationToken,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    socket: ListenSocket,
    folder: DaemonFolder,
}

impl RunningServer {
    /// Socket of the Controller.
    #[must_use]
    pub fn address(&self) -> &std::path::Path {
        &self.address
    }

    /// The pods of this daemon.
    #[must_use]
    pub fn pods(&self) -> &Arc<Pods> {
        &self.pods
    }

    /// Stops all pods within `deadline`, unless they go on without us, answers what is under way, and stops listening.
    pub async fn shutdown(self, deadline: Duration) {
        if self.pods.outlive_daemon() {
            // Nothing of theirs may be undone when we end.
            std::mem::forget(Arc::clone(&self.pods));
        } else {
            self.pods.shutdown_all(deadline).await;
        }
        self.stop.cancel();
        let Self {
            serving,
            socket,
            folder,
            ..
        } = self;
        let abort = serving.abort_handle();
        match tokio::time::timeout(CLOSE_LIMIT, serving).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(e))) => warn!("serving failed: {e}"),
            Ok(Err(e)) => warn!("serving failed: {e}"),
            Err(_) => abort.abort(),
        }
        drop(socket);
        drop(folder);
        info!("stopped");
    }
}

async fn make_backend(
    config: &Config,
    survive: bool,
) -> Result<Arc<dyn SandboxBackend>, BackendError> {
    Ok(match config.sandbox.mode {
        Mode::InProcess => Arc::new(VmmBackend::new(config).await?),
        Mode::External => Arc::new(ExternalBackend::new(config, survive).await?),
    })
}

/// Lets this process open as many files as it may: each file a guest knows of costs one.
fn allow_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(e) = raised {
        warn!("cannot raise the limit of open files: {e}");
    }
}

/// How long clients may keep their connections once all pods are gone.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
