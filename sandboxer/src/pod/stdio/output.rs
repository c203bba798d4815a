//! The host's end of stdout or stderr.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;

use super::super::error::{PodError, Result};
use super::input::is_fifo;
use super::path_of;
use super::streams::{Registered, SCHEME, Streams};

/// Keeps what was written while its reader restarts.
#[derive(Debug)]
pub(super) enum Keeper {
    /// A read end of the fifo.
    Fifo {
        /// Held, never read.
        _reader: pipe::Receiver,
    },
    /// The stream can be connected to again.
    Stream {
        /// Held.
        _stream: Registered,
    },
}

/// Where output is written to.
pub(super) struct Output {
    writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    keeper: Option<Keeper>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

impl Output {
    /// Opens the fifo or appends to the file that `name` names.
    pub(super) fn open(field: &'static str, name: &str, streams: &Arc<Streams>) -> Result<Self> {
        if name.starts_with(SCHEME) {
            let (writer, stream) = streams.open_output(name)?;
            return Ok(Self {
                writer: Box::new(writer),
                keeper: Some(Keeper::Stream { _stream: stream }),
            });
        }
        let path = path_of(field, name)?;
        let failed = || format!("opening {field} {}", path.display());
        let fifo = match is_fifo(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound && name.starts_with("file://") => false,
            found => found.map_err(PodError::io(failed()))?,
        };
        if fifo {
            Self::open_fifo(&path).map_err(PodError::io(failed()))
        } else {
            Self::append(&path).map_err(PodError::io(failed()))
        }
    }

    fn open_fifo(path: &Path) -> std::io::Result<Self> {
        // Reading first: a writer can only be opened without waiting when there is a reader.
        let keeper = pipe::OpenOptions::new().open_receiver(path)?;
        let writer = pipe::OpenOptions::new().open_sender(path)?;
        Ok(Self {
            writer: Box::new(writer),
            keeper: Some(Keeper::Fifo { _reader: keeper }),
        })
    }

    fn append(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)?;
        Ok(Self {
            writer: Box::new(tokio::fs::File::from_std(file)),
            keeper: None,
        })
    }

    /// Writes into a logging program's pipe.
    pub(super) fn from_pipe(writer: pipe::Sender) -> Self {
        Self {
            writer: Box::new(writer),
            keeper: None,
        }
    }

    pub(super) fn take_keeper(&mut self) -> Option<Keeper> {
        self.keeper.take()
    }

    pub(super) fn into_writer(self) -> Box<dyn AsyncWrite + Send + Sync + Unpin> {
        self.writer
    }
}
