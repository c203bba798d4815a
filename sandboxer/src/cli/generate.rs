//! `kuasar-ctl completions` and `man`: files made from the definition of the command line.

use std::io::{ErrorKind, Write};

use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs, ManArgs};
use super::error::{CliError, Doing, Result};
use super::output;

const NAME: &str = "kuasar-ctl";

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), NAME, &mut script);
    match std::io::stdout().write_all(&script) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::caused("cannot write the output", &e))
        }
        _ => Ok(()),
    }
}

pub(super) fn man(args: &ManArgs) -> Result<()> {
    if !args.dir.is_dir() {
        return Err(
            CliError::new(format!("{} is not a folder", args.dir.display()))
                .next(format!("mkdir -p {}", args.dir.display())),
        );
    }
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .doing(|| format!("write manual pages to {}", args.dir.display()))?;
    output::line(&format!("manual pages written to {}", args.dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_manual_page() {
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs {
            dir: dir.path().to_owned(),
        })
        .unwrap();
        for page in [
            "kuasar-ctl.1",
            "kuasar-ctl-run.1",
            "kuasar-ctl-guest-build.1",
        ] {
            let text = std::fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(text.contains("kuasar-ctl"), "{page}");
        }
        man(&ManArgs {
            dir: dir.path().join("none"),
        })
        .unwrap_err();
    }
}
