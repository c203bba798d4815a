//! A daemon as a program: its log, and its life between systemd's signals.

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::{Server, ServerError, ServerOptions, answer_watchdog};
use crate::causes::with_causes;
use crate::config::Config;

/// How long all pods together may take to stop when the daemon is told to end, before the
/// factor for slow hosts.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// Logs to stderr: by `level`, the value of `--log-level`, else as the configuration says.
///
/// # Errors
/// Not such a level.
pub fn start_logging(level: Option<&str>, config: &Config) -> Result<(), Box<dyn Error>> {
    let (source, level) = match level {
        Some(level) => ("--log-level", level),
        None => ("sandbox.log_level", config.sandbox.log_level.as_str()),
    };
    let filter = crate::log::filter(level)
        .map_err(|e| format!("{source} = {level:?}: {e}; use for instance \"info\""))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

/// Ends the daemon `program`: says on stderr why it failed, if it did, and what to try.
pub fn end(program: &str, result: Result<(), Box<dyn Error>>) -> ExitCode {
    let Err(e) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("{program}: {}", with_causes(e.as_ref()));
    if let Some(fix) = e.downcast_ref::<ServerError>().and_then(ServerError::fix) {
        eprintln!("  try: {fix}");
    }
    ExitCode::FAILURE
}

/// Serves until SIGTERM or SIGINT, then stops all pods.
///
/// # Errors
/// As for [`Server::start`].
pub fn run_until_told(options: ServerOptions) -> Result<(), Box<dyn Error>> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("sandboxer")
        .build()?
        .block_on(serve(options))
}

async fn serve(options: ServerOptions) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::start(options).await?;
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!("cannot tell systemd that the daemon is ready: {e}");
    }
    let address = server.address().to_owned();
    let watchdog = tokio::spawn(async move { answer_watchdog(&address).await });
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!("{name}: stopping all sandboxes");
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
        warn!("cannot tell systemd that the daemon is stopping: {e}");
    }
    server.shutdown(SHUTDOWN_LIMIT).await;
    watchdog.abort();
    Ok(())
}
