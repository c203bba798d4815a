//! Logging to the console.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::panic;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::Params;
use crate::sys;
use crate::sys::fork_guard;

static CONSOLE: OnceLock<File> = OnceLock::new();

/// Opens the log. It is a copy of standard error: in a forked child, descriptor 2 becomes
/// the container's, and the runtime's messages do not belong there.
pub fn open() -> io::Result<()> {
    let copy: OwnedFd = io::stderr().as_fd().try_clone_to_owned()?;
    CONSOLE.get_or_init(|| copy.into());
    Ok(())
}

/// Writes one line that must be seen, whatever the log level.
pub fn urgent(message: &str) {
    // There is no place left to report a console that cannot be written.
    let _ = match CONSOLE.get() {
        Some(mut console) => writeln!(console, "vmm-task: {message}"),
        None => writeln!(io::stderr(), "vmm-task: {message}"),
    };
}

/// Starts logging.
pub fn start(params: &Params) {
    let library = if params.debug {
        params.log_level
    } else {
        params.log_level.min(LevelFilter::ERROR)
    };
    let targets = Targets::new()
        .with_default(params.log_level)
        .with_target("libcontainer", library)
        .with_target("libcgroups", library);
    let console = || -> Box<dyn Write> {
        match CONSOLE.get() {
            Some(console) => Box::new(console),
            None => Box::new(io::stderr()),
        }
    };
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_timer(uptime())
        .with_writer(console);
    // A second call finds the first one's subscriber: nothing to do.
    let _ = tracing_subscriber::registry()
        .with(layer)
        .with(targets)
        .try_init();
}

/// Logs panics. In a forked child it also ends the child: unwinding there would run a second
/// copy of the agent.
pub fn watch_panics() {
    panic::set_hook(Box::new(|info| {
        urgent(&format!("panic: {info}"));
        if fork_guard::is_child() {
            sys::exit_child(255);
        }
    }));
}
