//! Streams that containerd connects to the Task API's socket instead of opening fifos
//! (`io_type = "streaming"`).
//!
//! A stream has an id. Its process holds one end of a pipe; whoever connects under the id
//! gets the other, one connection at a time. A connection that breaks leaves the pipe as it
//! is, for containerd to connect again after a restart.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::super::error::{PodError, Result};

/// Scheme of a stream's name; the rest is the address of the Task API with the id.
pub(super) const SCHEME: &str = "ttrpc+unix://";

/// The reading end of an output, and what was read and not yet delivered.
#[derive(Debug)]
pub(crate) struct Outlet {
    pub(crate) pipe: pipe::Receiver,
    pub(crate) unsent: Vec<u8>,
}

/// The end of a stream that a connection serves.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// Of stdout or stderr.
    Output(Arc<tokio::sync::Mutex<Outlet>>),
    /// Of stdin; `None` once it is closed.
    Input(Arc<tokio::sync::Mutex<Option<pipe::Sender>>>),
}

/// The streams of a pod, by id.
#[derive(Debug)]
pub(crate) struct Streams {
    ends: Mutex<HashMap<String, End>>,
    /// Counts the streams that were opened.
    opened: watch::Sender<u64>,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            ends: Mutex::default(),
            opened: watch::Sender::new(0),
        }
    }
}

impl Streams {
    /// The end that belongs to a connection, once the process has opened its own. containerd
    /// connects before it creates the process. Cancel safe.
    pub(crate) async fn end(&self, id: &str) -> Option<End> {
        let mut opened = self.opened.subscribe();
        loop {
            opened.borrow_and_update();
            if let Some(end) = lock(&self.ends).get(id) {
                return Some(end.clone());
            }
            opened.changed().await.ok()?;
        }
    }

    /// Opens an output that `name` names: where to write, and what keeps it connectable.
    pub(super) fn open_output(self: &Arc<Self>, name: &str) -> Result<(pipe::Sender, Registered)> {
        let (sender, receiver) = pipe::pipe().map_err(failed(name))?;
        let outlet = Outlet {
            pipe: receiver,
            unsent: Vec::new(),
        };
        let end = End::Output(Arc::new(tokio::sync::Mutex::new(outlet)));
        Ok((sender, self.register(name, end)?))
    }

    /// Opens an input that `name` names: where to read, and what keeps it connectable.
    pub(super) fn open_input(self: &Arc<Self>, name: &str) -> Result<(pipe::Receiver, Registered)> {
        let (sender, receiver) = pipe::pipe().map_err(failed(name))?;
        let end = End::Input(Arc::new(tokio::sync::Mutex::new(Some(sender))));
        Ok((receiver, self.register(name, end)?))
    }

    fn register(self: &Arc<Self>, name: &str, end: End) -> Result<Registered> {
        let id = id_of(name)?;
        let mut ends = lock(&self.ends);
        if ends.contains_key(&id) {
            return Err(PodError::Exists { what: "stream", id });
        }
        ends.insert(id.clone(), end.clone());
        drop(ends);
        self.opened
            .send_modify(|count| *count = count.wrapping_add(1));
        Ok(Registered {
            streams: Arc::clone(self),
            id,
            end,
        })
    }
}

/// A stream that can be connected to, until this is dropped. What is connected goes on.
#[derive(Debug)]
pub(super) struct Registered {
    streams: Arc<Streams>,
    id: String,
    end: End,
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock(&self.streams.ends).remove(&self.id);
        // Nobody is connected, so nobody can say that the input has ended. A connection says
        // so after the bytes that are under way.
        if let End::Input(inlet) = &self.end
            && let Ok(mut inlet) = inlet.try_lock()
        {
            inlet.take();
        }
    }
}

fn failed(name: &str) -> impl FnOnce(io::Error) -> PodError {
    PodError::io(format!("opening {name}"))
}

/// The id in `ttrpc+unix:///path?streaming_id=ID`.
fn id_of(name: &str) -> Result<String> {
    let query = name.split_once('?').map_or("", |(_, query)| query);
    form_urlencoded::parse(query.as_bytes())
        .find(|(key, value)| key == "streaming_id" && !value.is_empty())
        .map(|(_, value)| value.into_owned())
        .ok_or_else(|| PodError::invalid("stdio", name, "must have a streaming_id"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const NAME: &str = "ttrpc+unix:///run/pod/task.sock?streaming_id=c1-stdout";

    #[tokio::test]
    async fn a_connection_waits_for_its_process() {
        let streams = Arc::new(Streams::default());
        let waiting = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.end("c1-stdout").await }
        });
        tokio::task::yield_now().await;
        let (mut writer, stream) = streams.open_output(NAME).unwrap();
        let Some(End::Output(outlet)) = waiting.await.unwrap() else {
            panic!("an output");
        };
        // What is written before the process ends is there after it.
        writer.write_all(b"bytes").await.unwrap();
        drop((writer, stream));
        let mut read = String::new();
        let mut outlet = outlet.lock().await;
        outlet.pipe.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "bytes");
    }

    #[tokio::test]
    async fn an_id_is_taken_until_its_process_goes() {
        let streams = Arc::new(Streams::default());
        let first = streams.open_output(NAME).unwrap();
        let error = streams.open_output(NAME).unwrap_err().to_string();
        assert!(error.contains("c1-stdout already exists"), "{error}");
        drop(first);
        streams.open_output(NAME).unwrap();
        let error = streams.open_output("ttrpc+unix:///x").unwrap_err();
        assert!(error.to_string().contains("streaming_id"), "{error}");
    }

    #[tokio::test]
    async fn closing_an_input_that_nobody_is_connected_to_ends_it() {
        let streams = Arc::new(Streams::default());
        let (mut reader, stream) = streams.open_input(NAME).unwrap();
        drop(stream);
        assert_eq!(reader.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
