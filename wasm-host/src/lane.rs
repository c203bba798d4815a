//! The threads that guests run on.
//!
//! A lane is one thread with its own event loop, in one network namespace. Guests on a lane
//! take turns; lanes compete in the kernel's scheduler, so that a guest which computes all the
//! time slows down neither other lanes nor the threads of the host program. Threads for
//! blocking file operations are children of the lane and inherit namespace, filter and
//! priority.

use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tracing::warn;

use crate::error::{Result, WasmError};
use crate::seccomp;

/// Threads of a lane for file operations that block.
const BLOCKING_THREADS: usize = 4;

/// How long such a thread waits for more work.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// How long file operations under way may take when a lane ends.
const CLOSE_LIMIT: Duration = Duration::from_millis(100);

/// Most characters of a thread's name in Linux.
const NAME_CHARS: usize = 15;

/// What a lane is made of.
#[derive(Debug, Default)]
pub struct LaneConfig {
    /// Name of its thread, cut to what Linux can show.
    pub name: String,
    /// The network namespace in which its sockets are opened; `None`: the host program's.
    pub netns: Option<File>,
    /// Whether its threads may only make the system calls that guests need.
    pub seccomp: bool,
    /// Added to the priority of its threads, 0 to 19, see `setpriority(2)`.
    pub nice: i32,
}

/// A thread that runs guests; it ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Lane {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    /// Starts a lane. Blocks until it can run guests.
    ///
    /// # Errors
    /// The thread cannot be made, or the namespace not be entered.
    pub fn start(config: LaneConfig) -> Result<Self> {
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let name: String = config.name.chars().take(NAME_CHARS).collect();
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || run(&config, &ready, stopped))
            .map_err(WasmError::io("starting a thread for guests"))?;
        let handle = started
            .recv()
            .map_err(|_| WasmError::Engine("a thread for guests ended early".to_owned()))??;
        Ok(Self {
            inner: Arc::new(Inner {
                handle,
                stop: Some(stop),
                thread: Some(thread),
            }),
        })
    }

    /// Runs `task` on the lane's thread.
    pub(crate) fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.inner.handle.spawn(task)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else {
            return;
        };
        if thread.thread().id() == std::thread::current().id() {
            return;
        }
        let join = move || drop(thread.join());
        match Handle::try_current() {
            // An event loop does not wait for a thread.
            Ok(runtime) => drop(runtime.spawn_blocking(join)),
            Err(_) => join(),
        }
    }
}

type Started = std::sync::mpsc::SyncSender<Result<Handle>>;

fn run(config: &LaneConfig, ready: &Started, stopped: oneshot::Receiver<()>) {
    let runtime = prepare(config).and_then(|()| {
        Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_keep_alive(KEEP_ALIVE)
            .thread_name("wasm-file")
            .build()
            .map_err(WasmError::io("making an event loop for guests"))
    });
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(e) => {
            let _ = ready.send(Err(e));
            return;
        }
    };
    if ready.send(Ok(runtime.handle().clone())).is_err() {
        return;
    }
    // Ends when the sender is dropped.
    let _ = runtime.block_on(stopped);
    runtime.shutdown_timeout(CLOSE_LIMIT);
}

fn prepare(config: &LaneConfig) -> Result<()> {
    if let Some(netns) = &config.netns {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|e| WasmError::io("entering the network namespace")(e.into()))?;
    }
    if config.nice != 0 {
        // In Linux the priority is a thread's own.
        let me = Some(rustix::thread::gettid());
        if let Err(e) = rustix::process::setpriority_process(me, config.nice) {
            warn!("cannot lower the priority of a thread for guests: {e}");
        }
    }
    if config.seccomp {
        seccomp::confine_thread()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_runs_tasks_under_its_name_and_ends() {
        let lane = Lane::start(LaneConfig {
            name: "wasm-a-very-long-name".to_owned(),
            nice: 5,
            ..Default::default()
        })
        .unwrap();
        let name = lane.spawn(async { std::thread::current().name().map(str::to_owned) });
        let name = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(name)
            .unwrap();
        assert_eq!(name.as_deref(), Some("wasm-a-very-lon"));
        drop(lane);
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        let netns = File::open("/etc/passwd").unwrap();
        let refused = Lane::start(LaneConfig {
            name: "t".to_owned(),
            netns: Some(netns),
            ..Default::default()
        });
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("network namespace"), "{message}");
    }
}
