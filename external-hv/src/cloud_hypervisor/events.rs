//! What the VMM tells by itself: JSON objects with an empty line after each, through a named
//! pipe. A file would grow as the guest likes: each reset of a device is told.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::hypervisor::GuestEnd;

/// Most bytes of an object.
const MAX_EVENT: usize = 16 << 10;
/// Ends each object.
const SEPARATOR: &[u8] = b"\n\n";

/// Something that a pod has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The guest has ended.
    End(GuestEnd),
    /// The guest has let go of the device of this id.
    Removed(String),
}

#[derive(Debug, Deserialize)]
struct Event {
    source: String,
    event: String,
    properties: Option<Properties>,
}

#[derive(Debug, Deserialize)]
struct Properties {
    id: Option<String>,
}

impl Event {
    fn news(self) -> Option<News> {
        match (self.source.as_str(), self.event.as_str()) {
            ("guest", "panic") => Some(News::End(GuestEnd::Panicked)),
            ("vm", "rebooting" | "rebooted" | "shutdown") => Some(News::End(GuestEnd::Reset)),
            ("vm", "device-removed") => self.properties?.id.map(News::Removed),
            _ => None,
        }
    }
}

/// Makes the pipe at `path`, and opens it for a VMM. That can read it, too, so that it does
/// not fail while no daemon does.
pub(super) fn make(path: &Path) -> io::Result<OwnedFd> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    Ok(File::options().read(true).write(true).open(path)?.into())
}

/// The events of one VMM.
#[derive(Debug)]
pub(super) struct Events {
    pipe: pipe::Receiver,
    pending: Vec<u8>,
}

impl Events {
    /// Opens the pipe at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            pipe: pipe::OpenOptions::new().open_receiver(path)?,
            pending: Vec::new(),
        })
    }

    /// Waits for the next; `None` when the VMM has ended.
    pub(super) async fn next(&mut self) -> io::Result<Option<News>> {
        loop {
            while let Some(end) = find(&self.pending) {
                let event: Vec<u8> = self.pending.drain(..end + SEPARATOR.len()).collect();
                // Of the first, an earlier daemon may have read a part.
                let Ok(event) = serde_json::from_slice::<Event>(&event) else {
                    continue;
                };
                tracing::debug!(?event, "Cloud Hypervisor");
                if let Some(news) = event.news() {
                    return Ok(Some(news));
                }
            }
            if self.pending.len() > MAX_EVENT {
                return Err(io::Error::other("the event monitor writes no events"));
            }
            if self.pipe.read_buf(&mut self.pending).await? == 0 {
                return Ok(None);
            }
        }
    }
}

fn find(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(SEPARATOR.len())
        .position(|end| end == SEPARATOR)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// As the VMM writes it.
    fn event(source: &str, event: &str, properties: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": 0,\n    \"nanos\": 1\n  }},\n  \
             \"source\": \"{source}\",\n  \"event\": \"{event}\",\n  \
             \"properties\": {properties}\n}}\n\n"
        )
    }

    #[tokio::test]
    async fn events_are_understood_in_pieces_and_from_their_middle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut vmm = File::from(make(&path).unwrap());
        let mut events = Events::open(&path).unwrap();
        let waiting = tokio::spawn(async move {
            let mut all = Vec::new();
            while let Some(news) = events.next().await.unwrap() {
                all.push(news);
            }
            all
        });
        let removed = event(
            "vm",
            "device-removed",
            r#"{"bdf": "0000:00:07.0", "id": "disk3"}"#,
        );
        let half = event("vm", "rebooting", "null").split_off(40);
        let text = [
            half,
            event("vm", "booted", "null"),
            removed,
            event("vm", "rebooting", "null"),
        ];
        for piece in text.concat().as_bytes().chunks(23) {
            tokio::task::yield_now().await;
            vmm.write_all(piece).unwrap();
        }
        drop(vmm);
        let expected = [
            News::Removed("disk3".to_owned()),
            News::End(GuestEnd::Reset),
        ];
        assert_eq!(waiting.await.unwrap(), expected);
    }
}
