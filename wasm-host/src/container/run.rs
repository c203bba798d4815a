//! One guest from its first to its last instruction.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use wasmtime::{Store, Trap, UpdateDeadline};
use wasmtime_wasi::I32Exit;

use super::control::{Control, Controlled};
use super::memory::{Account, Limiter};
use super::state::{Outputs, State};
use super::{Ended, Exit, http};
use crate::config::Settings;
use crate::error::{Result, WasmError, causes};
use crate::host::Host;
use crate::program::{Entry, Program};
use crate::stdio::{Input, Output, Stdio};

/// Exit code of a guest that did what it must not, as after SIGABRT.
const ABORTED: u32 = 134;
/// Exit code of a guest that was ended by force, as after SIGKILL.
const KILLED: u32 = 137;
const SIGKILL: u32 = 9;

/// How long the readers of an ended guest may take for its last output.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What a guest is run with.
pub(super) struct Job {
    pub(super) host: Host,
    pub(super) settings: Arc<Settings>,
    pub(super) program: Arc<Program>,
    pub(super) account: Arc<Account>,
    pub(super) control: Arc<Control>,
}

type Guest<'a> = Pin<Box<dyn Future<Output = Result<(u32, Ended)>> + Send + 'a>>;

/// Tells the caller once whether the guest runs.
struct Starter(Mutex<Option<oneshot::Sender<Result<()>>>>);

impl Starter {
    /// Whether this was the first word.
    fn tell(&self, started: Result<()>) -> bool {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        sender.is_some_and(|sender| sender.send(started).is_ok())
    }
}

impl Job {
    /// Runs the guest on this event loop. Its end is told after its output is with its readers
    /// and its memory given back.
    pub(super) async fn run(
        self,
        stdio: Stdio,
        started: oneshot::Sender<Result<()>>,
        exit: watch::Sender<Option<Exit>>,
    ) {
        let outputs = Outputs {
            stdout: Output::new(stdio.stdout, stdio.terminal),
            stderr: Output::new(stdio.stderr, stdio.terminal),
        };
        let stdin = stdio.stdin.map(|reader| Input::new(reader, stdio.terminal));
        let starter = Starter(Mutex::new(Some(started)));
        let guest = AssertUnwindSafe(self.guest(stdin, &outputs, &starter)).catch_unwind();
        let (code, ended) = match guest.await {
            Ok(Ok(end)) => end,
            Ok(Err(error)) => {
                let message = error.to_string();
                if starter.tell(Err(error)) {
                    return;
                }
                (ABORTED, Ended::Host(message))
            }
            Err(_) => (ABORTED, Ended::Host("a host function panicked".to_owned())),
        };
        self.last_words(&outputs, &ended).await;
        outputs.stdout.close();
        outputs.stderr.close();
        exit.send_replace(Some(Exit {
            code,
            at: SystemTime::now(),
            ended,
        }));
    }

    async fn last_words(&self, outputs: &Outputs, ended: &Ended) {
        let name = self.settings.args.first().map_or("", String::as_str);
        let text = match ended {
            Ended::Signal(SIGKILL) => return,
            Ended::Exited | Ended::Signal(_) => String::new(),
            Ended::Trap(why) | Ended::Host(why) => format!("{name}: {why}\n"),
            Ended::OutOfMemory => format!("{name}: out of memory: the limit is {} bytes\n", {
                self.account.limit().unwrap_or_default()
            }),
            Ended::WallTime => format!("{name}: ran for longer than it may\n"),
        };
        let words = async {
            outputs.stdout.drained().await;
            outputs.stderr.append(&text).await;
        };
        let _ = timeout(DRAIN_LIMIT, words).await;
    }

    /// A store for one instance, with what the settings grant.
    pub(super) fn store(&self, stdin: Option<Input>, outputs: &Outputs) -> Result<Store<State>> {
        let limiter = Limiter::new(&self.account, &self.settings.limits);
        let handles = self.control.handles();
        let state = State::new(&self.settings, stdin, outputs, limiter, handles)?;
        let mut store = Store::new(&self.host.inner.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_epoch_deadline(self.control.slice());
        let control = Arc::clone(&self.control);
        store.epoch_deadline_callback(move |_| Ok(UpdateDeadline::Yield(control.slice())));
        Ok(store)
    }

    async fn guest(
        &self,
        stdin: Option<Input>,
        outputs: &Outputs,
        starter: &Starter,
    ) -> Result<(u32, Ended)> {
        let guest: Guest<'_> = match &self.program.entry {
            Entry::Proxy(proxy) => {
                // Not on any signal's mind before it can be asked.
                self.control.listen();
                let server = http::Server::bind(self, proxy, outputs)?;
                starter.tell(Ok(()));
                Box::pin(server.serve())
            }
            Entry::Module(_) | Entry::Command(_) => {
                let store = self.store(stdin, outputs)?;
                Box::pin(self.program(store, starter))
            }
        };
        let mut controlled = Controlled::new(guest, &self.control, &self.host.inner.ticker);
        let running = poll_fn(|cx| {
            let polled = Pin::new(&mut controlled).poll(cx);
            if polled.is_pending() {
                // It is held back, or computes before its entry is called.
                starter.tell(Ok(()));
            }
            polled
        });
        let ended = match self.settings.limits.wall_time {
            None => running.await,
            Some(limit) => match timeout(limit, running).await {
                Ok(ended) => ended,
                Err(_) => return Ok((KILLED, Ended::WallTime)),
            },
        };
        match ended {
            Ok(own) => own,
            Err(signal) => Ok((128 + signal, Ended::Signal(signal))),
        }
    }

    async fn program(&self, mut store: Store<State>, starter: &Starter) -> Result<(u32, Ended)> {
        let result = self.call(&mut store, starter).await?;
        Ok(self.judge(result, store.data().limiter.refused))
    }

    /// Calls the program's entry; the outer error is the host's.
    async fn call(
        &self,
        store: &mut Store<State>,
        starter: &Starter,
    ) -> Result<wasmtime::Result<u32>> {
        let refused = |e: wasmtime::Error| WasmError::Internal {
            name: self.settings.args.first().cloned().unwrap_or_default(),
            reason: causes(&e),
        };
        match &self.program.entry {
            Entry::Module(module) => {
                let instance = match module.instantiate_async(&mut *store).await {
                    Ok(instance) => instance,
                    // The module's start function ran and ended it.
                    Err(e) if e.is::<I32Exit>() || e.is::<Trap>() => return Ok(Err(e)),
                    Err(e) => return Err(refused(e)),
                };
                let start = instance
                    .get_typed_func::<(), ()>(&mut *store, "_start")
                    .map_err(refused)?;
                starter.tell(Ok(()));
                Ok(start.call_async(store, ()).await.map(|()| 0))
            }
            Entry::Command(command) => {
                let command = match command.instantiate_async(&mut *store).await {
                    Ok(command) => command,
                    Err(e) if e.is::<I32Exit>() || e.is::<Trap>() => return Ok(Err(e)),
                    Err(e) => return Err(refused(e)),
                };
                starter.tell(Ok(()));
                let run = command.wasi_cli_run().call_run(store).await;
                Ok(run.map(|run| u32::from(run.is_err())))
            }
            Entry::Proxy(_) => Err(WasmError::Engine("a server is no command".to_owned())),
        }
    }

    /// What a guest's result means.
    pub(super) fn judge(&self, result: wasmtime::Result<u32>, refused: bool) -> (u32, Ended) {
        let error = match result {
            Ok(0) => return (0, Ended::Exited),
            Ok(code) => return self.failed(code, Ended::Exited, refused),
            Err(error) => error,
        };
        if let Some(I32Exit(code)) = error.downcast_ref() {
            let code = code.cast_unsigned() & 0xff;
            if code == 0 {
                return (0, Ended::Exited);
            }
            return self.failed(code, Ended::Exited, refused);
        }
        self.failed(ABORTED, Ended::Trap(causes(&error)), refused)
    }

    /// A guest that was refused memory and then failed, failed for that.
    fn failed(&self, code: u32, ended: Ended, refused: bool) -> (u32, Ended) {
        if !refused {
            return (code, ended);
        }
        self.account.ended_for_memory();
        match ended {
            // It dealt with it in its own way.
            Ended::Exited => (code, Ended::OutOfMemory),
            _ => (KILLED, Ended::OutOfMemory),
        }
    }
}
