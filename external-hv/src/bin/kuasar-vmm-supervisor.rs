//! The process beside each external VMM: serves it our devices, and sees how it ends. Started
//! by the daemon only.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(job) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("kuasar-vmm-supervisor is started by vmm-sandboxer, with a job");
        return ExitCode::FAILURE;
    };
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match external_hv::supervisor::run(&job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("kuasar-vmm-supervisor: {err}");
            ExitCode::FAILURE
        }
    }
}
