//! The resident daemon of a node: pods in microVMs for containerd, iSulad and `kuasar-ctl`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use sandboxer::causes::with_causes;
use sandboxer::config::{Config, Overrides};
use sandboxer::server::{DEFAULT_DIR, DEFAULT_LISTEN, Server, ServerError, ServerOptions};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// How long all pods together may take to stop when the daemon is told to end, before the
/// factor for slow hosts.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// Runs pods in microVMs, for containerd, iSulad and kuasar-ctl.
///
/// Serves containerd's sandbox Controller API on a Unix socket and, for each pod, the Task
/// API. The VMs are threads of this process, or processes of an external hypervisor.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Socket of the Controller API
    #[arg(short, long, value_name = "SOCKET", default_value = DEFAULT_LISTEN)]
    listen: PathBuf,

    /// Folder for the state of pods; one daemon per folder
    #[arg(short, long, value_name = "DIR", default_value = DEFAULT_DIR)]
    dir: PathBuf,

    /// Configuration file [default: /var/lib/kuasar/config.toml, if it exists]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    overrides: Overrides,

    /// Least severe messages to log: error, warn, info, debug, trace, or directives such as
    /// info,vmm_core=debug
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG")]
    log_level: Option<String>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vmm-sandboxer: {}", with_causes(e.as_ref()));
            if let Some(fix) = e.downcast_ref::<ServerError>().and_then(ServerError::fix) {
                eprintln!("  try: {fix}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::load(args.config.as_deref())?;
    args.overrides.apply(&mut config);
    start_logging(args.log_level.as_deref(), &config)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("sandboxer")
        .build()?
        .block_on(serve(ServerOptions {
            listen: args.listen,
            dir: args.dir,
            config,
            backend: None,
        }))
}

fn start_logging(level: Option<&str>, config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let (source, level) = match level {
        Some(level) => ("--log-level", level),
        None => ("sandbox.log_level", config.sandbox.log_level.as_str()),
    };
    let filter = sandboxer::log::filter(level)
        .map_err(|e| format!("{source} = {level:?}: {e}; use for instance \"info\""))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

async fn serve(options: ServerOptions) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::start(options).await?;
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!("cannot tell systemd that the daemon is ready: {e}");
    }
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!("{name}: stopping all sandboxes");
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
        warn!("cannot tell systemd that the daemon is stopping: {e}");
    }
    server.shutdown(SHUTDOWN_LIMIT).await;
    Ok(())
}
