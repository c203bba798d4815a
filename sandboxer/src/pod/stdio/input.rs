//! The host's end of stdin.

use std::path::Path;

use tokio::io::AsyncRead;
use tokio::net::unix::pipe;

use super::super::error::{PodError, Result};
use super::path_of;

/// Keeps a fifo from reporting end of file before the API says stdin is closed: a client
/// may close its end and open it again.
pub(super) type Closer = pipe::Sender;

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
    pub(super) fn open(name: &str) -> Result<Self> {
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
                closer: Some(closer),
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
