//! WebAssembly modules and components as containers, in this process, on Wasmtime.
//!
//! A [`Host`] is one engine for all containers of a process: one pool of memories, one cache
//! of compiled code. It [loads](Host::load) a [`Program`], which a [`Lane`] (a thread, in a
//! network namespace) runs any number of times as a [`Container`]: with arguments,
//! environment, folders and streams of its own, within [`Limits`], to be stopped and
//! continued, signalled and measured like a process. Nothing is granted that is not asked for.
//!
//! ```no_run
//! use wasm_host::{Host, HostConfig, Lane, LaneConfig, Settings, Stdio};
//!
//! # async fn run() -> Result<(), wasm_host::WasmError> {
//! let host = Host::new(HostConfig::default())?;
//! let program = host.load("hello.wasm".as_ref()).await?;
//! let lane = Lane::start(LaneConfig::default())?;
//! let container = host.container(Settings::default());
//! let process = container.start(&lane, &program, Stdio::default()).await?;
//! println!("{:?}", process.wait().await);
//! # Ok(())
//! # }
//! ```

mod config;
mod container;
mod error;
mod host;
mod lane;
mod program;
mod seccomp;
mod stdio;
mod terminal;
mod ticker;

pub use config::{CacheConfig, CpuQuota, HostConfig, Limits, Mount, Network, Settings};
pub use container::{Container, Ended, Exit, Process, Stats};
pub use error::{Result, WasmError};
pub use host::Host;
pub use lane::{Lane, LaneConfig};
pub use program::{Program, Root};
pub use stdio::{Reader, Stdio, Writer};
pub use terminal::Terminal;
