//! The programs that containerd finds by the name of a runtime type.
//!
//! `containerd-shim-kuasar-vmm-v2` and `-wasm-v2` stand between containerd and a daemon that
//! holds all pods, for containerds without proxy plugins of type "sandbox", and for
//! `sandboxer = "shim"`. There is one such process per pod. It serves
//! `containerd.runtime.sandbox.v1.Sandbox` out of the daemon's Controller, and hands every
//! other call on to the pod's own task socket without looking into it.
//!
//! The `-v1` programs are for pods that containerd reaches through a proxy plugin: no process
//! of theirs stays, they only clean up.

mod address;
mod arguments;
mod bundle;
mod daemon;
mod delete;
mod frame;
mod info;
mod log;
mod proxy;
mod rpc;
mod sandbox;
mod serve;
mod settings;
mod start;

use std::io::Write;
use std::process::ExitCode;

use arguments::{Action, Arguments};

/// Version of these programs.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What one of the programs is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// The program.
    pub program: &'static str,
    /// The runtime type that containerd resolves to it.
    pub name: &'static str,
    /// Key of the daemon's socket in the settings.
    pub key: &'static str,
    /// The daemon's name, for messages.
    pub daemon: &'static str,
    /// Where the daemon listens unless told otherwise.
    pub socket: &'static str,
    /// Whether `start` leaves a process that serves the pod.
    pub serves: bool,
}

/// Runs the program of `runtime` with the arguments of this process.
#[must_use]
pub fn main(runtime: &Runtime) -> ExitCode {
    let done = Arguments::parse(std::env::args().skip(1))
        .map_err(Error::Usage)
        .and_then(|arguments| run(runtime, &arguments));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}: {e}", runtime.program);
            ExitCode::FAILURE
        }
    }
}

fn run(runtime: &Runtime, arguments: &Arguments) -> Result<(), Error> {
    let answer = match arguments.action {
        Action::Help => arguments::help(runtime).into_bytes(),
        Action::Version => format!("{} {VERSION}\n", runtime.name).into_bytes(),
        Action::Info => info::info(runtime),
        Action::Start => start::start(runtime, arguments)?.into_bytes(),
        Action::Delete => delete::delete(runtime, arguments)?,
        Action::Serve => return serve::serve(runtime, arguments),
    };
    let mut stdout = std::io::stdout();
    stdout
        .write_all(&answer)
        .and_then(|()| stdout.flush())
        .map_err(Error::io("answering on stdout"))
}

/// Why a program failed. The message goes to containerd's log.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The arguments are not what containerd gives.
    #[error("{0}")]
    Usage(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The settings cannot be used.
    #[error("{0}")]
    Settings(String),
}

impl Error {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// An async runtime on the calling thread.
fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("making an async runtime"))
}
