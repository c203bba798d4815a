//! `kuasar-ctl guest`: the kernel and initramfs that pods boot.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use guest_image::{Cache, GuestError, GuestImage, Initramfs, KernelRecipe, Progress, Step};

use super::args::{GuestArgs, GuestCommand, GuestKernel};
use super::error::{CliError, Doing, Result, chain};
use super::output::{self, DIM, size};

/// The agent's file name, beside this program.
const AGENT: &str = "vmm-task";

pub(super) fn guest(args: &GuestArgs) -> Result<()> {
    match &args.command {
        GuestCommand::Build {
            kernel,
            keep_current,
            agent,
            json,
        } => build(*kernel, *keep_current, agent.clone(), *json),
        GuestCommand::Info { json } => {
            let cache = Cache::locate().map_err(|e| explain(&e))?;
            show(
                &GuestImage::current(&cache).map_err(|e| explain(&e))?,
                *json,
            )
        }
    }
}

fn build(
    kernel: GuestKernel,
    keep_current: bool,
    agent: Option<PathBuf>,
    json: bool,
) -> Result<()> {
    let agent = match agent {
        Some(agent) => agent,
        None => beside_this_program()?,
    };
    if !agent.is_file() {
        return Err(
            CliError::new(format!("the agent {} is not a file", agent.display()))
                .next("build it with `make agent`, then name it with --agent"),
        );
    }
    let cache = Cache::locate().map_err(|e| explain(&e))?;
    let initramfs = Initramfs::new(agent);
    let mut shown = Shown::new();
    let report = &mut |p| shown.show(p);
    let image = match kernel {
        GuestKernel::Built => KernelRecipe::locate()
            .and_then(|recipe| GuestImage::build(&cache, &recipe, &initramfs, report)),
        GuestKernel::Distro => GuestImage::build_with_distro_kernel(&cache, initramfs, report),
    };
    shown.end();
    let image = image.map_err(|e| explain(&e))?;
    if !keep_current {
        image.make_current(&cache).map_err(|e| explain(&e))?;
    }
    show(&image, json)
}

fn beside_this_program() -> Result<PathBuf> {
    let own = std::env::current_exe().doing(|| "find this program".to_owned())?;
    Ok(own.with_file_name(AGENT))
}

/// The errors of the guest's builder say what to do themselves.
fn explain(error: &GuestError) -> CliError {
    let failed = CliError::new(chain(error));
    match error {
        GuestError::NotBuilt(_) => failed.next("kuasar-ctl guest build"),
        _ => failed,
    }
}

fn show(image: &GuestImage, json: bool) -> Result<()> {
    let info = image.info();
    if json {
        return output::json(&info);
    }
    let facts = &info.kernel_facts;
    for (name, value) in [
        ("kernel", info.kernel.display().to_string()),
        (
            "",
            format!("Linux {}, {}", facts.version, size(facts.size_bytes)),
        ),
        (
            "",
            format!("source {}, {}", facts.package_version, facts.compiler),
        ),
        (
            "",
            format!(
                "{} patches, {} options asked for",
                facts.patches.len(),
                facts.options_requested
            ),
        ),
        ("initramfs", info.initramfs.display().to_string()),
        (
            "",
            format!(
                "{}, {}",
                size(info.initramfs_size_bytes),
                info.initramfs_digest
            ),
        ),
    ] {
        output::line(&format!("{name:<11}{value}"))?;
    }
    Ok(())
}

/// Progress: a line that is rewritten on a terminal, a line per step elsewhere.
struct Shown {
    live: bool,
    started: Instant,
    step: Option<Step>,
}

impl Shown {
    fn new() -> Self {
        Self {
            live: io::stderr().is_terminal(),
            started: Instant::now(),
            step: None,
        }
    }

    fn show(&mut self, progress: Progress) {
        let new = self.step.replace(progress.step) != Some(progress.step);
        let seconds = self.started.elapsed().as_secs();
        let mut err = anstream::stderr();
        // A build goes on whether or not anybody can be told.
        if self.live {
            let _ = write!(err, "\r\x1b[2K{DIM}{seconds:>4} s{DIM:#}  {progress}");
            let _ = err.flush();
        } else if new {
            let _ = writeln!(err, "{seconds:>4} s  {progress}");
        }
    }

    fn end(&self) {
        if self.live {
            let _ = write!(io::stderr(), "\r\x1b[2K");
        }
    }
}
