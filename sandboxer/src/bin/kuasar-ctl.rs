//! Runs and manages containers in microVMs; see [`sandboxer::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    sandboxer::cli::main()
}
