//! `kuasar-ctl`: a client of the daemon's two APIs, with a daemon of its own where none runs.
//!
//! [`args`] is the command line. `run` and `exec` share [`attend`], which stays with a process
//! from start to end, [`stdio`], which carries its streams, and [`spec`], which describes it.
//! [`store`] remembers the pods that `run` made; [`pods`] finds them again.

mod args;
mod attend;
mod check;
mod client;
mod daemon;
mod debug_console;
mod disk;
mod error;
mod exec;
mod freeze;
mod generate;
mod guest;
mod lifecycle;
mod logs;
mod output;
mod pods;
mod ps;
mod root;
mod run;
mod signals;
mod spec;
mod stdio;
mod store;
mod template;
mod terminal;
mod update;
mod values;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use self::args::{Cli, Command};
use self::error::{Doing, OWN_ERROR, Result};
use crate::log;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version come this way too; nobody can be told if this fails.
            let _ = e.print();
            return if e.use_stderr() {
                ExitCode::from(OWN_ERROR)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    start_log(cli.global.verbose);
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            output::error(&e);
            ExitCode::from(e.code)
        }
    }
}

/// `RUST_LOG` decides; otherwise errors only, or with --verbose each step of the daemon.
fn start_log(verbose: bool) {
    let default = if verbose { "info" } else { "error" };
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let filter = log::filter(if wanted.is_empty() { default } else { &wanted })
        .unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(output::stderr_has_colours())
        .with_writer(std::io::stderr);
    // A second subscriber in a test process is no reason to fail.
    let _ = subscriber.try_init();
}

/// Commands that need no daemon run as they are; the others in an async runtime.
fn dispatch(cli: Cli) -> Result<u8> {
    let Cli { global, command } = cli;
    match command {
        Command::Guest(args) => return guest::guest(&args).map(|()| 0),
        Command::Completions(args) => return generate::completions(&args).map(|()| 0),
        Command::Man(args) => return generate::man(&args).map(|()| 0),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .doing(|| "start the async runtime".to_owned())?;
    let result = runtime.block_on(async {
        match command {
            Command::Run(args) => run::run(&global, *args).await,
            Command::Exec(args) => exec::exec(&global, *args).await,
            Command::DebugConsole(args) => debug_console::open(&global, &args).await.map(|()| 0),
            Command::Ps(args) => ps::ps(&global, &args).await.map(|()| 0),
            Command::Inspect(args) => ps::inspect(&global, &args).await.map(|()| 0),
            Command::Logs(args) => logs::logs(&global, &args).await.map(|()| 0),
            Command::Stop(args) => lifecycle::stop(&global, &args).await.map(|()| 0),
            Command::Rm(args) => lifecycle::rm(&global, &args).await.map(|()| 0),
            Command::Pause(args) => freeze::pause(&global, &args).await.map(|()| 0),
            Command::Resume(args) => freeze::resume(&global, &args).await.map(|()| 0),
            Command::Update(args) => update::update(&global, &args).await.map(|()| 0),
            Command::Snapshot(args) => freeze::snapshot(&global, &args).await.map(|()| 0),
            Command::Restore(args) => freeze::restore(&global, &args).await.map(|()| 0),
            Command::Check(args) => {
                let ok = check::check(&global, &args).await?;
                Ok(u8::from(!ok))
            }
            Command::Template(args) => template::template(&args, global.verbose).await,
            Command::Guest(_) | Command::Completions(_) | Command::Man(_) => Ok(0),
        }
    });
    // A blocked write to a paused terminal must not keep this process from ending.
    runtime.shutdown_background();
    result
}
