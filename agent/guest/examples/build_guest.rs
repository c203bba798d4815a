//! Builds the guest kernel, and an initramfs when given a static init program:
//! `build_guest [INIT]`.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use guest_image::{Cache, GuestImage, Initramfs, KernelArtifact, KernelRecipe, Progress, Result};

/// Shows each step once, and on a terminal also how far it is.
fn show() -> impl FnMut(Progress) {
    let mut last = None;
    let terminal = io::stderr().is_terminal();
    move |progress| {
        let mut err = io::stderr();
        // A build goes on whether or not anybody can be told.
        let _ = match (last.replace(progress.step) == Some(progress.step), terminal) {
            (true, true) => write!(err, "\r{progress}"),
            (true, false) => Ok(()),
            (false, true) => write!(err, "\n{progress}"),
            (false, false) => writeln!(err, "{}", progress.step),
        };
    }
}

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let cache = Cache::locate()?;
    let recipe = KernelRecipe::locate()?;
    let mut show = show();
    let (kernel, initramfs) = match env::args_os().nth(1) {
        Some(init) => {
            let image = GuestImage::build(&cache, &recipe, &Initramfs::new(init), &mut show)?;
            (image.kernel, Some(image.initramfs))
        }
        None => (
            KernelArtifact::build(&cache, &recipe, &mut show)?.vmlinux,
            None,
        ),
    };
    println!("\nkernel    {}", kernel.display());
    if let Some(initramfs) = initramfs {
        println!("initramfs {}", initramfs.display());
    }
    Ok(())
}
