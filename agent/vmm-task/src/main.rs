//! `vmm-task`, the guest agent: PID 1 of every pod's microVM.
//!
//! It prepares the guest, dials the daemon on the host and serves `kuasar.agent.v1.Agent` on
//! that connection: containers by libcontainer, their standard streams over further
//! connections, exits and out-of-memory kills pushed as events.
//!
//! One thread, few system calls, no processes but the containers': on hosts that emulate the
//! guest's kernel mode every system call takes a millisecond. As PID 1 it must not end:
//! what cannot be repaired is printed and the machine reset.
//!
//! Outside a VM, see [`config::DIAL_ENV`], it runs as any root process in namespaces of its
//! own; the integration tests use that.

mod agent;
mod clock;
mod config;
mod container;
mod control;
mod cpus;
mod debug_shell;
mod disks;
mod error;
mod events;
mod fd;
mod forward;
mod init;
mod log;
mod machine;
mod mounts;
mod net;
mod network;
mod reaper;
mod sandbox;
mod service;
mod stdio;
mod streams;
mod sys;
mod uevents;

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use agent_api::PROTOCOL_VERSION;
use agent_api::rpc::{Ready, create_agent};
use nix::sched::CpuSet;
use tokio::sync::Notify;
use tracing::{error, info, warn};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener as RpcListener;

use crate::agent::Agent;
use crate::config::{Config, Params};
use crate::reaper::Reaper;
use crate::service::Service;
use crate::streams::Streams;

/// How long the reply to `Shutdown` may take to reach the host.
const GOODBYE_DEADLINE: Duration = Duration::from_millis(200);

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error("{0}: {1}")]
    Start(&'static str, #[source] io::Error),
    #[error("accepting streams: {0}")]
    Streams(#[source] io::Error),
    #[error("waiting for children: {0}")]
    Reaper(#[source] io::Error),
    #[error("serving the host: {0}")]
    Rpc(#[from] ttrpc::Error),
}

fn at(step: &'static str) -> impl FnOnce(io::Error) -> Fatal {
    move |e| Fatal::Start(step, e)
}

fn main() {
    let init_at_us = clock::boottime_us();
    let nested = Config::nested();
    let guest = nested.is_none();
    log::watch_panics();
    let ended = catch_unwind(AssertUnwindSafe(|| start(nested, init_at_us)));
    let code = match ended {
        Ok(Ok(())) => 0,
        Ok(Err(e)) => {
            log::urgent(&format!("fatal: {e}"));
            1
        }
        // Reported by the hook.
        Err(_) => 1,
    };
    machine::reset(guest, code);
}

/// Prepares everything and serves until the host asks to shut down.
fn start(nested: Option<Config>, init_at_us: u64) -> Result<(), Fatal> {
    log::open().map_err(at("console"))?;
    sys::fork_guard::install().map_err(at("fork guard"))?;
    if nested.is_none() {
        init::own_root().map_err(|e| Fatal::Start("root", e.into()))?;
    }
    init::mount_proc().map_err(at("/proc"))?;
    let config = match nested {
        Some(config) => config,
        None => {
            let cmdline = fs::read_to_string("/proc/cmdline").map_err(at("/proc/cmdline"))?;
            Config::guest(Params::parse(&cmdline))
        }
    };
    log::start(&config.params);
    config.params.warnings.iter().for_each(|w| warn!("{w}"));
    if let Err(e) = sys::map_program() {
        warn!("the program is not mapped ahead: {e}");
    }
    init::prepare(config.guest);
    let reaper = Reaper::new().map_err(at("SIGCHLD"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(at("event loop"))?;
    runtime.block_on(serve(&config, reaper, init_at_us))
}

/// Serves the host until it asks to shut down.
async fn serve(config: &Config, reaper: Reaper, init_at_us: u64) -> Result<(), Fatal> {
    let listener = config
        .listen
        .listen()
        .map_err(at("listening for streams"))?;
    let streams = Streams::default();
    let agent = Agent::new(streams.clone(), ready(init_at_us));
    let shutdown = Arc::new(Notify::new());
    let lost = Arc::new(Notify::new());
    let service = Service::new(Arc::clone(&agent), Arc::clone(&shutdown));
    let connections = control::connections(config.dial.clone(), Arc::clone(&lost));
    let mut server = Server::new()
        .add_listener(RpcListener::new(connections))
        .register_service(create_agent(Arc::new(service)));
    server.start().await?;
    // Tasks, not branches: waking the root task costs two system calls each time.
    let mut reaping = tokio::spawn(reaper.run(agent));
    let mut accepting = tokio::spawn(streams.serve(listener, config.params.debug_shell.clone()));
    tokio::select! {
        end = &mut reaping => Err(Fatal::Reaper(end.unwrap_or_else(io::Error::other))),
        end = &mut accepting => Err(Fatal::Streams(end.unwrap_or_else(io::Error::other))),
        () = shutdown.notified() => {
            // The host hangs up when it has the reply.
            if tokio::time::timeout(GOODBYE_DEADLINE, lost.notified()).await.is_err() {
                info!("the host is still connected");
            }
            Ok(())
        }
    }
    .inspect_err(|e| error!("{e}"))
}

/// The first event of every subscription.
fn ready(init_at_us: u64) -> Ready {
    let kernel = nix::sys::utsname::uname();
    let system = nix::sys::sysinfo::sysinfo();
    // `std::thread::available_parallelism` would look through cgroups first.
    let cpus = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    let set = |c: &CpuSet| {
        (0..CpuSet::count())
            .filter(|i| c.is_set(*i).unwrap_or(false))
            .count()
    };
    let cpus = cpus.map_or(1, |c| set(&c));
    Ready {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel
            .map(|k| k.release().to_string_lossy().into_owned())
            .unwrap_or_default(),
        init_at_us,
        ready_at_us: clock::boottime_us(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: system.map(|s| s.ram_total()).unwrap_or_default(),
        ..Default::default()
    }
}
