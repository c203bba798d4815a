//! A client of the QEMU Machine Protocol, which StratoVirt speaks as well.
//!
//! JSON lines over a Unix socket: a greeting, then an answer to each command, and
//! events in between. Fds travel beside a command.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::dial::dial;
use crate::hypervisor::HvError;
use crate::rights;

/// Most bytes of one message: the list of a large VM's devices is far shorter.
const MAX_LINE: usize = 4 << 20;

/// An event: its name and data.
pub type Event<'a> = (&'a str, &'a Value);

/// A session with a VMM.
pub struct Qmp {
    vmm: &'static str,
    inner: Arc<Inner>,
    /// One command at a time: StratoVirt takes what it reads at once for one.
    turn: tokio::sync::Mutex<u64>,
    limit: Duration,
    reader: AbortHandle,
}

struct Inner {
    stream: UnixStream,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    /// Of the command in progress, by its id.
    answer: Option<(String, oneshot::Sender<Result<Value, String>>)>,
    /// Why the session ended.
    ended: Option<String>,
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qmp({})", self.vmm)
    }
}

impl Qmp {
    /// Connects to a VMM's socket and negotiates; `events` is called for each event, on the
    /// runtime. `limit` bounds this and each later command.
    ///
    /// # Errors
    /// The VMM does not answer in time, or not as it should.
    pub async fn connect(
        vmm: &'static str,
        path: &Path,
        limit: Duration,
        events: impl Fn(Event<'_>) + Send + 'static,
    ) -> Result<Self, HvError> {
        let silent = |_| HvError::Silent {
            vmm,
            what: "greet on its QMP socket",
            limit,
        };
        let broken = |err: io::Error| HvError::Protocol {
            vmm,
            why: err.to_string(),
        };
        let greet = async {
            let stream = dial(path).await?;
            let mut lines = Lines::default();
            let greeting = lines.next(&stream).await?;
            if greeting.get("QMP").is_none() {
                return Err(io::Error::other("it does not greet with \"QMP\""));
            }
            Ok((stream, lines))
        };
        let (stream, lines) = timeout(limit, greet)
            .await
            .map_err(silent)?
            .map_err(broken)?;
        let inner = Arc::new(Inner {
            stream,
            pending: Mutex::default(),
        });
        let reading = read(vmm, Arc::clone(&inner), lines, events);
        let qmp = Self {
            vmm,
            inner,
            turn: tokio::sync::Mutex::new(0),
            limit,
            reader: tokio::spawn(reading).abort_handle(),
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command.
    ///
    /// # Errors
    /// The VMM refuses, is gone, or does not answer in time.
    pub async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, HvError> {
        self.execute_with(command, arguments, None).await
    }

    /// Runs a command that an fd goes with.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub async fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, HvError> {
        let work = async {
            let mut last = self.turn.lock().await;
            *last = last.wrapping_add(1);
            // A string: StratoVirt knows no other ids.
            let id = last.to_string();
            let answer = self.expect(&id)?;
            let message = json!({"execute": command, "arguments": arguments, "id": id});
            let mut line = message.to_string().into_bytes();
            line.push(b'\n');
            self.write(&line, fd).await.map_err(|err| err.to_string())?;
            match answer.await {
                Ok(answer) => answer,
                Err(_) => Err(self.ended()),
            }
        };
        timeout(self.limit, work)
            .await
            .map_err(|_| HvError::Silent {
                vmm: self.vmm,
                what: "answer a command",
                limit: self.limit,
            })?
            .map_err(|why| HvError::Refused {
                vmm: self.vmm,
                request: command.to_owned(),
                why,
            })
    }

    fn expect(&self, id: &str) -> Result<oneshot::Receiver<Result<Value, String>>, String> {
        let mut pending = lock(&self.inner.pending);
        if let Some(why) = &pending.ended {
            return Err(why.clone());
        }
        let (sender, receiver) = oneshot::channel();
        pending.answer = Some((id.to_owned(), sender));
        Ok(receiver)
    }

    fn ended(&self) -> String {
        let ended = lock(&self.inner.pending).ended.clone();
        ended.unwrap_or_else(|| "the session ended".to_owned())
    }

    async fn write(&self, mut line: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let stream = &self.inner.stream;
        while !line.is_empty() {
            stream.writable().await?;
            let fds: Vec<BorrowedFd<'_>> = fd.iter().copied().collect();
            let sent = rights::try_send(stream, line, &fds);
            match sent {
                Ok(sent) => {
                    line = line.get(sent..).unwrap_or_default();
                    fd = None;
                }
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Hands answers and events out until the VMM hangs up.
async fn read(vmm: &'static str, inner: Arc<Inner>, mut lines: Lines, events: impl Fn(Event<'_>)) {
    let why = loop {
        let message = match lines.next(&inner.stream).await {
            Ok(message) => message,
            Err(err) => break err.to_string(),
        };
        if let Some(event) = message.get("event").and_then(Value::as_str) {
            events((event, message.get("data").unwrap_or(&Value::Null)));
            continue;
        }
        // StratoVirt leaves the id out of some; another's is of a command that was given up.
        let id = message.get("id").and_then(Value::as_str);
        let answer = {
            let mut pending = lock(&inner.pending);
            let its = pending.answer.as_ref().map(|(its, _)| its.as_str());
            let others = id.is_some() && id != its;
            if others { None } else { pending.answer.take() }
        };
        let Some((_, answer)) = answer else {
            tracing::debug!(vmm, %message, "an answer that nobody waits for");
            continue;
        };
        let result = match (message.get("return"), message.get("error")) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(error)) => Err(describe(error)),
            (None, None) => Err("an answer without return and error".to_owned()),
        };
        let _ = answer.send(result);
    };
    let mut pending = lock(&inner.pending);
    pending.ended = Some(why);
    pending.answer = None;
}

fn describe(error: &Value) -> String {
    let text = error.get("desc").and_then(Value::as_str);
    text.map_or_else(|| error.to_string(), str::to_owned)
}

/// Cuts what is read into messages.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Of it, known to hold no newline.
    scanned: usize,
}

impl Lines {
    async fn next(&mut self, stream: &UnixStream) -> io::Result<Value> {
        loop {
            let rest = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
                let end = self.scanned.saturating_add(at);
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                self.scanned = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(serde_json::from_slice(&line)?);
            }
            self.scanned = self.buffer.len();
            if self.scanned > MAX_LINE {
                return Err(io::Error::other("a message of several megabytes"));
            }
            stream.readable().await?;
            match stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Err(io::Error::other("it hung up")),
                Ok(_) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
