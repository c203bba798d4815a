//! What the VMM tells by itself: JSON objects in a file that grows, noticed by inotify.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use serde::Deserialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::hypervisor::GuestEnd;

/// Most bytes that wait for the end of an object.
const MAX_PENDING: usize = 64 << 10;

#[derive(Debug, Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// The events of one VMM.
#[derive(Debug)]
pub(super) struct Events {
    file: File,
    changed: AsyncFd<OwnedFd>,
    pending: Vec<u8>,
}

impl Events {
    /// Opens the file at `path`, which the VMM appends to; made if it is not there yet.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        add_watch(&inotify, path, WatchFlags::MODIFY)?;
        // SAFETY: the `AsyncFd` owns the fd, and gives nobody else a way to close it.
        let changed = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?;
        Ok(Self {
            file,
            changed,
            pending: Vec::new(),
        })
    }

    /// Waits until the guest has ended.
    pub(super) async fn guest_end(&mut self) -> io::Result<GuestEnd> {
        loop {
            if let Some(end) = self.read()? {
                return Ok(end);
            }
            let mut ready = self.changed.readable().await?;
            // What changed is only this file.
            let mut told = [0; 1024];
            while rustix::io::read(ready.get_inner(), &mut told).is_ok_and(|n| n > 0) {}
            ready.clear_ready();
        }
    }

    fn read(&mut self) -> io::Result<Option<GuestEnd>> {
        self.file.read_to_end(&mut self.pending)?;
        let mut objects = serde_json::Deserializer::from_slice(&self.pending).into_iter::<Event>();
        let mut end = None;
        while let Some(Ok(event)) = objects.next() {
            tracing::debug!(?event, "Cloud Hypervisor");
            end = end.or(match (event.source.as_str(), event.event.as_str()) {
                (_, "panic") => Some(GuestEnd::Panicked),
                ("vm", "rebooting" | "rebooted" | "shutdown") => Some(GuestEnd::Reset),
                _ => None,
            });
        }
        let parsed = objects.byte_offset();
        self.pending.drain(..parsed.min(self.pending.len()));
        if self.pending.len() > MAX_PENDING {
            return Err(io::Error::other("the event monitor writes no JSON"));
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn the_end_of_the_guest_is_seen_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut events = Events::open(&path).unwrap();
        let mut vmm = File::options().append(true).open(&path).unwrap();
        let waiting = tokio::spawn(async move { events.guest_end().await.unwrap() });
        for piece in [
            "{\"timestamp\":{\"secs\":0,\"nanos\":1},\"source\":\"vm\",\"event\":\"booted\",",
            "\"properties\":null}\n\n{\"source\":\"vm\",",
            "\"event\":\"rebooting\",\"properties\":null}",
        ] {
            tokio::task::yield_now().await;
            vmm.write_all(piece.as_bytes()).unwrap();
        }
        assert_eq!(waiting.await.unwrap(), GuestEnd::Reset);
    }
}
