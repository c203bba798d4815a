//! The host's end of stdin.

use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncRead;
use tokio::net::unix::pipe;

use super::super::error::{PodError, Result};
use super::path_of;
use super::streams::{Registered, SCHEME, Streams};

/// Keeps a fifo from reporting end of file before the API says stdin is closed: a client
/// may close its end and open it again.
#[derive(Debug)]
pub(super) enum Closer {
    /// A write end of the fifo.
    Fifo {
        /// Held, never written to.
        _writer: pipe::Sender,
    },
    /// The stream can be connected to.
    Stream {
        /// Held.
        _stream: Registered,
    },
}

/// Where stdin is read from.
pub(super) struct Input {
    reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    closer: Option<Closer>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input").finish_non_exhaustive()
    }
}

impl Input {
    pub(super) fn open(name: &str, streams: &Arc<Streams>) -> Result<Self> {
        if name.starts_with(SCHEME) {
            let (reader, stream) = streams.open_input(name)?;
            return Ok(Self {
                reader: Box::new(reader),
                closer: Some(Closer::Stream { _stream: stream }),
            });
        }
        let path = path_of("stdin", name)?;
        let failed = || format!("opening stdin {}", path.display());
        if is_fifo(&path).map_err(PodError::io(failed()))? {
            // Reading first: a writer can only be opened without waiting when there is one.
            let reader = pipe::OpenOptions::new()
                .open_receiver(&path)
                .map_err(PodError::io(failed()))?;
            let closer = pipe::OpenOptions::new()
                .open_sender(&path)
                .map_err(PodError::io(failed()))?;
            return Ok(Self {
                reader: Box::new(reader),
                closer: Some(Closer::Fifo { _writer: closer }),
            });
        }
        let file = std::fs::File::open(&path).map_err(PodError::io(failed()))?;
        Ok(Self {
            reader: Box::new(tokio::fs::File::from_std(file)),
            closer: None,
        })
    }

    pub(super) fn take_closer(&mut self) -> Option<Closer> {
        self.closer.take()
    }

    pub(super) fn into_reader(self) -> Box<dyn AsyncRead + Send + Sync + Unpin> {
        self.reader
    }
}

pub(super) fn is_fifo(path: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).map(|m| m.file_type().is_fifo())
}
