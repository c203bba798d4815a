//! The resident daemon for pods in Quark, for containerd, iSulad and `kuasar-ctl`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use sandboxer::backend::quark::QuarkBackend;
use sandboxer::config::Config;
use sandboxer::server::daemon::{end, run_until_told, start_logging};
use sandboxer::server::{DEFAULT_QUARK_DIR, DEFAULT_QUARK_LISTEN, ServerOptions};

/// Runs pods in Quark, for containerd, iSulad and kuasar-ctl.
///
/// Serves containerd's sandbox Controller API on a Unix socket and, for each pod, the Task
/// API. Each pod is a process of Quark, which goes on when this daemon ends.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Socket of the Controller API
    #[arg(short, long, value_name = "SOCKET", default_value = DEFAULT_QUARK_LISTEN)]
    listen: PathBuf,

    /// Folder for the state of pods; one daemon per folder
    #[arg(short, long, value_name = "DIR", default_value = DEFAULT_QUARK_DIR)]
    dir: PathBuf,

    /// Configuration file [default: /var/lib/kuasar/config.toml, if it exists]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Least severe messages to log: error, warn, info, debug, trace, or directives such as
    /// info,external_hv=debug
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG")]
    log_level: Option<String>,
}

fn main() -> ExitCode {
    end("quark-sandboxer", run(Args::parse()))
}

fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::load(args.config.as_deref())?;
    start_logging(args.log_level.as_deref(), &config)?;
    let backend = QuarkBackend::new(&config)?;
    run_until_told(ServerOptions {
        listen: args.listen,
        dir: args.dir,
        config,
        pods_outlive: true,
        backend: Some(Arc::new(backend)),
    })
}
