//! The daemon a command talks to: the running one, or one inside this process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::client::Controller;
use super::error::{CliError, Doing, Result, chain};
use super::output::Steps;
use super::store::{private_dir, state_root};
use crate::backend::SandboxBackend;
use crate::backend::wasm::WasmBackend;
use crate::config::{Config, Overrides};
use crate::pod::record;
use crate::pod::storage::remove_tree;
use crate::server::{
    DEFAULT_LISTEN, DEFAULT_WASM_DIR, DEFAULT_WASM_LISTEN, RunningServer, Server, ServerOptions,
};

/// Folder, below the CLI's own, that holds the daemons inside CLI processes.
const EMBEDDED: &str = "embedded";
const SOCKET: &str = "sandboxer.sock";
const STATE: &str = "state";
/// Lock file in a daemon's state folder.
const LOCK: &str = "daemon.lock";
/// Ending the only pod of an embedded daemon, on the slowest hosts.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// Which daemon runs a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// In a microVM.
    Vmm,
    /// A WebAssembly program.
    Wasm,
}

/// A daemon that a command wants.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    kind: Kind,
    address: PathBuf,
}

impl Wanted {
    /// The daemon of this kind at `address`, unless that is nothing but the default of
    /// another kind.
    pub(super) fn new(kind: Kind, address: &Path) -> Self {
        let address = match kind {
            Kind::Wasm if address == Path::new(DEFAULT_LISTEN) => Path::new(DEFAULT_WASM_LISTEN),
            _ => address,
        };
        Self {
            kind,
            address: address.to_owned(),
        }
    }

    fn program(&self) -> &'static str {
        match self.kind {
            Kind::Vmm => "vmm-sandboxer",
            Kind::Wasm => "wasm-sandboxer",
        }
    }
}

/// A daemon to run a pod with.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) controller: Controller,
    embedded: Option<Embedded>,
}

/// A daemon inside this process and its folder, which goes with it.
#[derive(Debug)]
struct Embedded {
    server: RunningServer,
    // Dropped after the server.
    _folder: Folder,
}

/// The folder of an embedded daemon. Should a mount remain in it, it stays, so that nothing
/// of a user's is ever deleted through a mount.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn create(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("d").tempdir_in(parent);
        let dir = dir.doing(|| format!("create a folder in {}", parent.display()))?;
        Ok(Self(dir.keep()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = remove_tree(&self.0) {
            tracing::error!("cannot remove {}: {e}", self.0.display());
        }
    }
}

impl Daemon {
    /// Connects to the daemon, or starts one inside this process, unless the
    /// pod is to outlive this process.
    pub(super) async fn reach(
        wanted: &Wanted,
        config: Option<&Path>,
        overrides: Overrides,
        detach: bool,
        steps: &Steps,
    ) -> Result<Self> {
        let address = &wanted.address;
        if let Some(controller) = Controller::connect(address).await? {
            return Ok(Self {
                controller,
                embedded: None,
            });
        }
        if detach {
            return Err(CliError::new(format!(
                "--detach needs a running daemon, and none listens on {}",
                address.display()
            ))
            .next(format!(
                "start one with `{}`, or leave --detach out",
                wanted.program()
            )));
        }
        steps.step(&format!(
            "nothing listens on {}: starting a daemon in this process",
            address.display()
        ));
        let embedded = Embedded::start(wanted.kind, config, overrides).await?;
        let Some(controller) = Controller::connect(embedded.server.address()).await? else {
            embedded.end().await;
            return Err(CliError::new("the daemon in this process does not answer"));
        };
        Ok(Self {
            controller,
            embedded: Some(embedded),
        })
    }

    /// Ends an embedded daemon with everything it holds.
    pub(super) async fn end(self) {
        drop(self.controller);
        if let Some(embedded) = self.embedded {
            embedded.end().await;
        }
    }
}

impl Embedded {
    async fn start(kind: Kind, config: Option<&Path>, overrides: Overrides) -> Result<Self> {
        let mut config = Config::load(config).map_err(|e| CliError::new(chain(&e)))?;
        overrides.apply(&mut config);
        // For one pod.
        config.templates.warm = 0;
        let backend: Option<Arc<dyn SandboxBackend>> = match kind {
            Kind::Vmm => None,
            Kind::Wasm => {
                let wasm = WasmBackend::new(config.wasm.clone());
                Some(Arc::new(wasm.map_err(|e| CliError::new(chain(&e)))?))
            }
        };
        let parent = embedded_root();
        private_dir(&parent)?;
        collect_garbage(parent.clone()).await;
        let folder = Folder::create(&parent)?;
        let server = Server::start(ServerOptions {
            listen: folder.0.join(SOCKET),
            dir: folder.0.join(STATE),
            config,
            pods_outlive: false,
            backend,
        })
        .await
        .map_err(|e| {
            let fix = e
                .fix()
                .unwrap_or("`kuasar-ctl check` says what this host lacks");
            CliError::new(chain(&e)).next(fix)
        })?;
        Ok(Self {
            server,
            _folder: folder,
        })
    }

    async fn end(self) {
        let Self { server, _folder } = self;
        server.shutdown(SHUTDOWN_LIMIT).await;
    }
}

/// Cleans up after CLI processes that were killed with a daemon inside. A living daemon holds
/// the lock of its folder.
async fn collect_garbage(parent: PathBuf) {
    let collect = move || {
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let state = entry.path().join(STATE);
            let Ok(lock) = File::open(state.join(LOCK)) else {
                // About to start, or ended in the middle of cleaning up: no pods either way.
                continue;
            };
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let cleaned = record::clean_stale(&state, &[]);
            let removed = remove_tree(&entry.path());
            tracing::debug!(folder = %entry.path().display(), ?cleaned, ?removed, "stale daemon");
        }
    };
    // Best effort: what stays is tried again by the next run.
    let _ = tokio::task::spawn_blocking(collect).await;
}

fn embedded_root() -> PathBuf {
    state_root().join(EMBEDDED)
}

/// Where a daemon listens, and its state folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) address: PathBuf,
    pub(super) dir: PathBuf,
}

/// The daemons whose pods a user may mean: the configured one, and those inside other CLI
/// processes.
pub(super) fn places(address: &Path, dir: &Path) -> Vec<Place> {
    let entries = std::fs::read_dir(embedded_root())
        .into_iter()
        .flatten()
        .flatten();
    let embedded = entries.map(|entry| Place {
        address: entry.path().join(SOCKET),
        dir: entry.path().join(STATE),
    });
    let wasm = (address == Path::new(DEFAULT_LISTEN)).then(|| Place {
        address: PathBuf::from(DEFAULT_WASM_LISTEN),
        dir: PathBuf::from(DEFAULT_WASM_DIR),
    });
    std::iter::once(Place {
        address: address.to_owned(),
        dir: dir.to_owned(),
    })
    .chain(wasm)
    .chain(embedded)
    .collect()
}
