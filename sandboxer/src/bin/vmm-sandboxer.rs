//! The resident daemon of a node: pods in microVMs for containerd, iSulad and `kuasar-ctl`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use sandboxer::config::{Config, Overrides};
use sandboxer::server::daemon::{end, run_until_told, start_logging};
use sandboxer::server::{DEFAULT_DIR, DEFAULT_LISTEN, ServerOptions};

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
    end("vmm-sandboxer", run(Args::parse()))
}

fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::load(args.config.as_deref())?;
    args.overrides.apply(&mut config);
    start_logging(args.log_level.as_deref(), &config)?;
    run_until_told(ServerOptions {
        listen: args.listen,
        dir: args.dir,
        config,
        pods_outlive: true,
        backend: None,
    })
}
