//! Carries this process's streams to and from the fifos of a container's process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe::{OpenOptions as PipeOptions, Receiver};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use super::client::StdioNames;
use super::error::{Doing, Result};

const COPY_BYTES: usize = 64 << 10;

/// The fifos of one process, our ends of the outputs open.
#[derive(Debug)]
pub(super) struct Fifos {
    names: StdioNames,
    stdin: Option<PathBuf>,
    stdout: Receiver,
    stderr: Option<Receiver>,
}

impl Fifos {
    /// Makes the fifos in `dir`, which the caller removes. A terminal has no stderr.
    pub(super) fn create(dir: &Path, stdin: bool, terminal: bool) -> Result<Self> {
        let make = |name: &str| -> Result<PathBuf> {
            let path = dir.join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
                .doing(|| format!("create {}", path.display()))?;
            Ok(path)
        };
        // Open before the daemon opens its ends, so that none of these waits or fails.
        let read = |path: &Path| {
            PipeOptions::new()
                .open_receiver(path)
                .doing(|| format!("open {}", path.display()))
        };
        let stdin = stdin.then(|| make("stdin")).transpose()?;
        let stdout = make("stdout")?;
        let stderr = (!terminal).then(|| make("stderr")).transpose()?;
        let text = |path: Option<&PathBuf>| {
            path.map(|p| p.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        Ok(Self {
            names: StdioNames {
                stdin: text(stdin.as_ref()),
                stdout: text(Some(&stdout)),
                stderr: text(stderr.as_ref()),
                terminal,
            },
            stdout: read(&stdout)?,
            stderr: stderr.as_deref().map(read).transpose()?,
            stdin,
        })
    }

    pub(super) fn names(&self) -> &StdioNames {
        &self.names
    }

    /// Starts copying. Call it once the daemon has opened its ends: an output without a
    /// writer reads as ended.
    pub(super) fn connect(self) -> Result<Streams> {
        let stdin_ended = match &self.stdin {
            Some(path) => Some(feed(open_stdin(path)?)),
            None => None,
        };
        let stdout = AbortOnDropHandle::new(tokio::spawn(copy(self.stdout, tokio::io::stdout())));
        let stderr = self
            .stderr
            .map(|from| AbortOnDropHandle::new(tokio::spawn(copy(from, tokio::io::stderr()))));
        Ok(Streams {
            stdin_ended,
            stdout,
            stderr,
        })
    }
}

/// Streams being copied.
#[derive(Debug)]
pub(super) struct Streams {
    stdin_ended: Option<oneshot::Receiver<()>>,
    stdout: AbortOnDropHandle<()>,
    stderr: Option<AbortOnDropHandle<()>>,
}

impl Streams {
    /// Completes, once, when our input has ended and all of it was passed on.
    pub(super) async fn stdin_ended(&mut self) {
        match &mut self.stdin_ended {
            Some(ended) => {
                let _ = ended.await;
                self.stdin_ended = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Waits until everything the process wrote is written here.
    pub(super) async fn drained(self) {
        let _ = self.stdout.await;
        if let Some(stderr) = self.stderr {
            let _ = stderr.await;
        }
    }
}

async fn copy(mut from: Receiver, mut to: impl AsyncWrite + Unpin) {
    let copied = tokio::io::copy(&mut from, &mut to).await;
    let flushed = to.flush().await;
    if let Err(e) = copied.and(flushed) {
        // Whoever read our output is gone; the process learns by its own broken pipe.
        tracing::debug!("output not passed on: {e}");
    }
}

/// Opens without waiting for a reader (the daemon already is one), then writes block.
fn open_stdin(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .doing(|| format!("open {}", path.display()))?;
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).doing(|| "set up stdin".to_owned())?;
    Ok(file)
}

/// Copies our stdin in a thread of its own: a read from a terminal cannot be cancelled, and
/// the thread must not keep this process from ending.
fn feed(mut to: File) -> oneshot::Receiver<()> {
    let (ended, receiver) = oneshot::channel();
    let copy = move || {
        let mut buffer = vec![0; COPY_BYTES];
        let mut stdin = io::stdin().lock();
        loop {
            let read = match stdin.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let part = buffer.get(..read).unwrap_or_default();
            if to.write_all(part).is_err() {
                break;
            }
        }
        drop(to);
        // The process may be gone already.
        let _ = ended.send(());
    };
    if let Err(e) = std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(copy)
    {
        tracing::warn!("no input is passed on: {e}");
    }
    receiver
}

/// A temporary folder for the fifos of an exec.
pub(super) fn fifo_dir(parent: &Path) -> Result<tempfile::TempDir> {
    fs::create_dir_all(parent).doing(|| format!("create {}", parent.display()))?;
    tempfile::Builder::new()
        .prefix("exec-")
        .tempdir_in(parent)
        .doing(|| format!("create a folder in {}", parent.display()))
}
