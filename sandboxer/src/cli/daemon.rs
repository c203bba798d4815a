//! The daemon a command talks to: the running one, or one inside this process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::Controller;
use super::error::{CliError, Result, chain};
use super::output::Steps;
use super::store::{private_dir, state_root};
use crate::config::Config;
use crate::server::{RunningServer, Server, ServerOptions};

/// Folder, below the CLI's own, that holds the daemons inside CLI processes.
const EMBEDDED: &str = "embedded";
const SOCKET: &str = "sandboxer.sock";
const STATE: &str = "state";
/// Ending the only pod of an embedded daemon, on the slowest hosts.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

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
    _dir: tempfile::TempDir,
}

impl Daemon {
    /// Connects to the daemon at `address`, or starts one inside this process.
    pub(super) async fn reach(
        address: &Path,
        config: Option<&Path>,
        steps: &Steps,
    ) -> Result<Self> {
        if let Some(controller) = Controller::connect(address).await? {
            return Ok(Self {
                controller,
                embedded: None,
            });
        }
        steps.step(&format!(
            "nothing listens on {}: starting a daemon in this process",
            address.display()
        ));
        let embedded = Embedded::start(config).await?;
        let Some(controller) = Controller::connect(embedded.server.address()).await? else {
            embedded.end().await;
            return Err(CliError::new("the daemon in this process does not answer"));
        };
        Ok(Self {
            controller,
            embedded: Some(embedded),
        })
    }

    /// Whether the daemon ends with this process.
    pub(super) fn is_embedded(&self) -> bool {
        self.embedded.is_some()
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
    async fn start(config: Option<&Path>) -> Result<Self> {
        let config = Config::load(config).map_err(|e| CliError::new(chain(&e)))?;
        let parent = embedded_root();
        private_dir(&parent)?;
        let dir = tempfile::Builder::new()
            .prefix("d")
            .tempdir_in(&parent)
            .map_err(|e| {
                CliError::caused(
                    format!("cannot create a folder in {}", parent.display()),
                    &e,
                )
            })?;
        let server = Server::start(ServerOptions {
            listen: dir.path().join(SOCKET),
            dir: dir.path().join(STATE),
            config,
            backend: None,
        })
        .await
        .map_err(|e| {
            CliError::new(chain(&e)).next("`kuasar-ctl check` says what this host lacks")
        })?;
        Ok(Self { server, _dir: dir })
    }

    async fn end(self) {
        self.server.shutdown(SHUTDOWN_LIMIT).await;
    }
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
    std::iter::once(Place {
        address: address.to_owned(),
        dir: dir.to_owned(),
    })
    .chain(embedded)
    .collect()
}
