//! Booting a machine and saving it at the moment its agent dials the host.

use std::io;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::info;
use vmm_core::vm::{ExitReason, Vm, VmError};
use vmm_core::{BuildError, Host, Machine, MachineConfig, Snapshot, SnapshotError};

/// Why a template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildTemplateError {
    /// The machine could not be built.
    #[error("the template's machine cannot be built")]
    Build(#[from] BuildError),
    /// The machine could not be started.
    #[error("the template's machine cannot be started")]
    Start(#[from] VmError),
    /// It ended before its agent came up.
    #[error("the template's machine ended: {reason}{}", console_part(console))]
    Ended {
        /// Why.
        reason: ExitReason,
        /// The end of its console.
        console: String,
    },
    /// Its agent did not come up in time.
    #[error(
        "the agent of the template's machine did not dial within {limit:?} (timeouts.boot){}",
        console_part(console)
    )]
    Deadline {
        /// The limit.
        limit: Duration,
        /// The end of its console.
        console: String,
    },
    /// It could not be saved.
    #[error("the template's machine cannot be saved")]
    Save(#[from] SnapshotError),
    /// It was not built because of an earlier failure.
    #[error("not tried again so soon after it failed: {0}")]
    Recently(String),
    /// A file or a thread.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn console_part(console: &str) -> String {
    if console.trim().is_empty() {
        return String::new();
    }
    format!("; the end of its console:\n{}", console.trim_end())
}

/// What a template is built from.
#[derive(Debug)]
pub struct TemplateMachine {
    /// The machine: of the size and with the devices that clones will have.
    pub config: MachineConfig,
    /// From starting the vCPUs to the agent's dial.
    pub limit: Duration,
}

impl TemplateMachine {
    /// Boots it and saves it.
    ///
    /// # Errors
    /// See [`BuildTemplateError`]. Nothing of the machine is left.
    pub async fn boot(self, host: &Host) -> Result<Snapshot, BuildTemplateError> {
        let Self { config, limit } = self;
        let host = host.clone();
        let machine = blocking("building the template", move || {
            Machine::build(&host, config)
        })
        .await??;
        let dialled = machine
            .hold(agent_api::CONTROL_PORT)
            .map_err(io_error("holding the agent's dial"))?;
        machine.start().await?;
        wait(&machine, dialled, limit).await?;
        info!("the template's agent is up");
        Ok(blocking("saving the template", move || machine.into_snapshot()).await??)
    }
}

async fn wait(
    machine: &Machine,
    dialled: oneshot::Receiver<()>,
    limit: Duration,
) -> Result<(), BuildTemplateError> {
    let mut exited = machine.exited();
    let console = || machine.console_tail().unwrap_or_default();
    let first = async {
        tokio::select! {
            biased;
            dialled = dialled => dialled.is_ok(),
            _ = exited.wait_for(Option::is_some) => false,
        }
    };
    match timeout(limit, first).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(BuildTemplateError::Ended {
            reason: machine
                .exited()
                .borrow()
                .clone()
                .unwrap_or(ExitReason::Stopped),
            console: console(),
        }),
        Err(_) => Err(BuildTemplateError::Deadline {
            limit,
            console: console(),
        }),
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BuildTemplateError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| io_error(what)(io::Error::other(err)))
}

pub(super) fn io_error(what: &str) -> impl FnOnce(io::Error) -> BuildTemplateError {
    let what = what.to_owned();
    move |source| BuildTemplateError::Io { what, source }
}
