//! A container of a pod and the processes in it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use agent_api::rpc;
use agent_api::stream::StreamKind;
use tokio::io::{DuplexStream, duplex};
use vmm_core::vm::GuestStream;
use wasm_host::{Container, Lane, Limits, Program, Settings, Stdio, Terminal, WasmError};

use super::lock;
use super::spec::Spec;
use super::tty::TerminalStream;

/// Bytes of a stream that are under way.
const STREAM_BYTES: usize = 64 << 10;

/// A container.
#[derive(Debug)]
pub(super) struct WasmContainer {
    pub(super) spec: Spec,
    pub(super) container: Container,
    pub(super) lane: Lane,
    pub(super) limits: Mutex<Limits>,
    pub(super) init: Arc<WasmProcess>,
    pub(super) execs: Mutex<HashMap<String, Arc<WasmProcess>>>,
}

impl WasmContainer {
    /// The init process for an empty id, else that exec.
    pub(super) fn process(&self, exec_id: &str) -> Option<Arc<WasmProcess>> {
        if exec_id.is_empty() {
            return Some(Arc::clone(&self.init));
        }
        lock(&self.execs).get(exec_id).cloned()
    }

    /// All its processes, execs first.
    pub(super) fn processes(&self) -> Vec<Arc<WasmProcess>> {
        let mut all: Vec<_> = lock(&self.execs).values().cloned().collect();
        all.push(Arc::clone(&self.init));
        all
    }
}

/// What runs in a process, or why nothing can.
pub(super) type Loaded = Result<Arc<Program>, WasmError>;

/// A process of a container.
#[derive(Debug)]
pub(super) struct WasmProcess {
    pub(super) settings: Settings,
    /// Taken by the start.
    pub(super) program: Mutex<Option<Loaded>>,
    stdio: Mutex<Option<Stdio>>,
    ends: Mutex<HashMap<StreamKind, DuplexStream>>,
    terminal: Option<Terminal>,
    running: Arc<OnceLock<wasm_host::Process>>,
    pid: AtomicU32,
}

impl WasmProcess {
    /// A process that does not run yet, with its streams.
    pub(super) fn new(
        settings: Settings,
        program: Loaded,
        wanted: &rpc::Stdio,
    ) -> std::io::Result<Self> {
        let mut ends = HashMap::new();
        let mut terminal = None;
        let stdio = if wanted.terminal {
            let (user, stdio) = Terminal::open()?;
            if wanted.width != 0 {
                resize(&user, wanted.width, wanted.height)?;
            }
            terminal = Some(user);
            stdio
        } else {
            let mut stream = |kind, wanted: bool| {
                wanted.then(|| {
                    let (pod, guest) = duplex(STREAM_BYTES);
                    ends.insert(kind, pod);
                    guest
                })
            };
            Stdio {
                stdin: stream(StreamKind::Stdin, wanted.stdin).map(|s| Box::new(s) as _),
                stdout: stream(StreamKind::Stdout, wanted.stdout).map(|s| Box::new(s) as _),
                stderr: stream(StreamKind::Stderr, wanted.stderr).map(|s| Box::new(s) as _),
                terminal: false,
            }
        };
        Ok(Self {
            settings,
            program: Mutex::new(Some(program)),
            stdio: Mutex::new(Some(stdio)),
            ends: Mutex::new(ends),
            terminal,
            running: Arc::default(),
            pid: AtomicU32::new(0),
        })
    }

    /// The pod's end of a stream; once each.
    pub(super) fn stream(&self, kind: StreamKind) -> Option<Box<dyn GuestStream>> {
        if let Some(terminal) = &self.terminal {
            let running = Arc::clone(&self.running);
            return Some(Box::new(TerminalStream::new(terminal.clone(), move || {
                if let Some(process) = running.get() {
                    process.signal(SIGINT);
                }
            })));
        }
        let end = lock(&self.ends).remove(&kind)?;
        Some(Box::new(end))
    }

    pub(super) fn take_stdio(&self) -> Stdio {
        lock(&self.stdio).take().unwrap_or_default()
    }

    pub(super) fn runs(&self, process: wasm_host::Process) {
        let _ = self.running.set(process);
    }

    /// What runs or ran, once it was started.
    pub(super) fn running(&self) -> Option<&wasm_host::Process> {
        self.running.get()
    }

    /// Whether it was started and has not ended.
    pub(super) fn is_alive(&self) -> bool {
        self.running
            .get()
            .is_some_and(|process| process.exit().is_none())
    }

    pub(super) fn resize(&self, width: u32, height: u32) -> std::io::Result<()> {
        match &self.terminal {
            Some(terminal) => resize(terminal, width, height),
            None => Err(std::io::Error::other("the process has no terminal")),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Acquire)
    }

    pub(super) fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Release);
    }
}

const SIGINT: u32 = 2;

fn resize(terminal: &Terminal, width: u32, height: u32) -> std::io::Result<()> {
    let chars = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    terminal.resize(chars(width), chars(height))
}
