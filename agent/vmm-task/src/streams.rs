//! Byte streams from the host: accepted, named by their header, parked until claimed.
//!
//! The host may open a stream before or after the process it belongs to is created.
//! Whoever comes first waits here, bounded in number and time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::stream::{Header, HeaderError, MAX_HEADER_BYTES, StreamId};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::debug_shell;
use crate::fd::Fd;
use crate::forward;
use crate::net::Listener;

/// Connections that have not sent their header yet.
const MAX_UNNAMED: usize = 64;
/// Named streams that wait for their process.
const MAX_PARKED: usize = 256;
/// From connection to the end of the header.
const HEADER_DEADLINE: Duration = Duration::from_secs(30);
/// How long either side of a stream waits for the other.
const PARK_DEADLINE: Duration = Duration::from_secs(120);

/// A named connection, and what was read past its header.
#[derive(Debug)]
pub struct Stream {
    /// The connection.
    pub fd: Fd,
    /// Payload that arrived with the header.
    pub head: Vec<u8>,
    /// Told when the host opens the stream anew: this one leads nowhere then.
    pub replaced: Arc<Notify>,
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The header is malformed.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// No newline within [`MAX_HEADER_BYTES`], or the peer went away before one.
    #[error("no complete stream header")]
    Incomplete,
    /// The header did not come in time.
    #[error("no stream header within {} s", HEADER_DEADLINE.as_secs())]
    Late,
    /// Already connected.
    #[error("stream {0} is connected already")]
    Duplicate(StreamId),
    /// [`MAX_PARKED`] streams wait.
    #[error("too many streams wait for a process")]
    Full,
    /// The connection failed.
    #[error("reading the stream header: {0}")]
    Io(#[from] std::io::Error),
}

#[derive(Debug)]
enum Slot {
    /// The host came first.
    Parked { stream: Stream, serial: u64 },
    /// The process came first.
    Awaited(oneshot::Sender<Stream>),
    /// Both are there; the host may have opened it anew since, after it was away.
    Claimed {
        replaced: Arc<Notify>,
        next: Option<Stream>,
    },
}

impl Slot {
    fn claimed(stream: &Stream) -> Self {
        Self::Claimed {
            replaced: Arc::clone(&stream.replaced),
            next: None,
        }
    }
}

#[derive(Debug, Default)]
struct Slots {
    by_id: HashMap<StreamId, Slot>,
    parked: usize,
    serial: u64,
}

impl Slots {
    fn next_serial(&mut self) -> u64 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }
}

/// The streams of all processes.
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Mutex<Slots>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a stream for a process, waiting for the host to open it. `None` when it does
    /// not come in time, or somebody else has it. [`Self::release`] frees the name again.
    pub async fn claim(&self, id: &StreamId) -> Option<Stream> {
        let arrival = {
            let mut slots = self.lock();
            match slots.by_id.remove(id) {
                Some(Slot::Parked { stream, .. }) => {
                    slots.parked = slots.parked.saturating_sub(1);
                    slots.by_id.insert(id.clone(), Slot::claimed(&stream));
                    return Some(stream);
                }
                Some(taken @ Slot::Claimed { .. }) => {
                    slots.by_id.insert(id.clone(), taken);
                    return None;
                }
                Some(Slot::Awaited(_)) | None => {}
            }
            let (sender, arrival) = oneshot::channel();
            slots.by_id.insert(id.clone(), Slot::Awaited(sender));
            arrival
        };
        match timeout(PARK_DEADLINE, arrival).await {
            Ok(Ok(stream)) => Some(stream),
            _ => {
                self.release(id);
                None
            }
        }
    }

    /// Forgets a name and closes what is parked under it.
    pub fn release(&self, id: &StreamId) {
        let mut slots = self.lock();
        if let Some(Slot::Parked { .. } | Slot::Claimed { next: Some(_), .. }) =
            slots.by_id.remove(id)
        {
            slots.parked = slots.parked.saturating_sub(1);
        }
    }

    /// A claimed stream broke: the name is free, for the stream that the host has opened
    /// since or will open.
    pub fn lost(&self, id: &StreamId) {
        let mut slots = self.lock();
        if let Some(Slot::Claimed {
            next: Some(stream), ..
        }) = slots.by_id.remove(id)
        {
            let serial = slots.next_serial();
            slots
                .by_id
                .insert(id.clone(), Slot::Parked { stream, serial });
            self.expire(id.clone(), serial);
        }
    }

    /// Hands in a stream from the host.
    fn offer(&self, id: StreamId, stream: Stream) -> Result<(), Refused> {
        let mut slots = self.lock();
        let serial = slots.next_serial();
        let full = slots.parked >= MAX_PARKED;
        match slots.by_id.entry(id) {
            Entry::Vacant(_) if full => return Err(Refused::Full),
            Entry::Vacant(entry) => {
                let id = entry.key().clone();
                entry.insert(Slot::Parked { stream, serial });
                slots.parked = slots.parked.saturating_add(1);
                self.expire(id, serial);
            }
            Entry::Occupied(mut entry) => match entry.get_mut() {
                Slot::Awaited(_) => {
                    let claimed = Slot::claimed(&stream);
                    if let Slot::Awaited(process) = entry.insert(claimed) {
                        // A process that stopped waiting has no use for it.
                        let _ = process.send(stream);
                    }
                }
                Slot::Claimed { next: None, .. } if full => return Err(Refused::Full),
                Slot::Claimed { replaced, next } => {
                    replaced.notify_one();
                    if next.replace(stream).is_none() {
                        slots.parked = slots.parked.saturating_add(1);
                    }
                }
                Slot::Parked { .. } => return Err(Refused::Duplicate(entry.key().clone())),
            },
        }
        Ok(())
    }

    fn expire(&self, id: StreamId, serial: u64) {
        let me = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(PARK_DEADLINE).await;
            let mut slots = me.lock();
            let same = matches!(slots.by_id.get(&id), Some(Slot::Parked { serial: s, .. }) if *s == serial);
            if same {
                slots.by_id.remove(&id);
                slots.parked = slots.parked.saturating_sub(1);
                warn!(stream = %id, "closed: no process claimed it");
            }
        });
    }

    /// Accepts streams for ever; `shell` is what the debug console runs, if there is to be one.
    pub async fn serve(self, listener: Listener, shell: Option<PathBuf>) -> std::io::Error {
        let unnamed = Arc::new(Semaphore::new(MAX_UNNAMED));
        loop {
            let fd = match listener.accept().await {
                Ok(fd) => fd,
                Err(e) => return e,
            };
            let Ok(permit) = Arc::clone(&unnamed).try_acquire_owned() else {
                warn!("stream refused: {MAX_UNNAMED} connections have sent no header yet");
                continue;
            };
            let me = self.clone();
            let shell = shell.clone();
            tokio::spawn(async move {
                let read = timeout(HEADER_DEADLINE, read_header(fd)).await;
                drop(permit);
                let offered = match read.unwrap_or(Err(Refused::Late)) {
                    Ok((Header::Process(id), stream)) => {
                        debug!(stream = %id, "connected");
                        me.offer(id, stream)
                    }
                    Ok((Header::Tcp(port), stream)) => {
                        forward::tcp(port, stream.fd, &stream.head).await;
                        Ok(())
                    }
                    Ok((Header::Console(size), stream)) => {
                        debug_shell::serve(shell.as_deref(), size, stream.fd, &stream.head).await;
                        Ok(())
                    }
                    Err(e) => Err(e),
                };
                if let Err(e) = offered {
                    warn!("stream refused: {e}");
                }
            });
        }
    }
}

/// Reads the header line of a new connection.
async fn read_header(mut fd: Fd) -> Result<(Header, Stream), Refused> {
    let mut line = Vec::new();
    let mut chunk = [0; MAX_HEADER_BYTES];
    loop {
        let n = fd.read(&mut chunk).await?;
        line.extend(chunk.iter().take(n));
        if let Some(end) = line.iter().position(|b| *b == b'\n') {
            let mut head = line.split_off(end);
            head.remove(0);
            let id = String::from_utf8_lossy(&line).parse()?;
            let replaced = Arc::default();
            return Ok((id, Stream { fd, head, replaced }));
        }
        if n == 0 || line.len() >= MAX_HEADER_BYTES {
            return Err(Refused::Incomplete);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Fd) {
        let (host, guest) = UnixStream::pair().unwrap();
        (host, Fd::from_blocking(guest.into()).unwrap())
    }

    fn stream() -> Stream {
        Stream {
            fd: pair().1,
            head: Vec::new(),
            replaced: Arc::default(),
        }
    }

    fn id(text: &str) -> StreamId {
        text.parse().unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn payload_behind_the_header_is_kept() {
        let (mut host, guest) = pair();
        host.write_all(b"c1//stdin\nfirst bytes").unwrap();
        let (id, stream) = read_header(guest).await.unwrap();
        assert_eq!(id.to_string(), "c1//stdin");
        assert_eq!(stream.head, b"first bytes");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_header_may_come_in_pieces() {
        let (mut host, guest) = pair();
        let reader = tokio::spawn(read_header(guest));
        for part in ["c1/", "e1/std", "out", "\n"] {
            host.write_all(part.as_bytes()).unwrap();
            tokio::task::yield_now().await;
        }
        let header = reader.await.unwrap().unwrap().0;
        assert_eq!(header, Header::Process(id("c1/e1/stdout")));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn endless_short_and_wrong_headers_are_refused() {
        let (mut host, guest) = pair();
        host.write_all(&[b'a'; 2 * MAX_HEADER_BYTES]).unwrap();
        assert!(matches!(read_header(guest).await, Err(Refused::Incomplete)));

        let (mut host, guest) = pair();
        host.write_all(b"c1//std").unwrap();
        drop(host);
        assert!(matches!(read_header(guest).await, Err(Refused::Incomplete)));

        let (mut host, guest) = pair();
        host.write_all(b"../x/stdin\n").unwrap();
        assert!(matches!(read_header(guest).await, Err(Refused::Header(_))));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn either_side_may_come_first() {
        let streams = Streams::default();
        streams.offer(id("c1//stdout"), stream()).unwrap();
        assert!(streams.claim(&id("c1//stdout")).await.is_some());

        let waiting = tokio::spawn({
            let streams = streams.clone();
            async move { streams.claim(&id("c2//stdout")).await }
        });
        tokio::task::yield_now().await;
        streams.offer(id("c2//stdout"), stream()).unwrap();
        assert!(waiting.await.unwrap().is_some());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn duplicates_are_refused_until_claimed_and_replace_what_broke() {
        let streams = Streams::default();
        let name = id("c1//stdout");
        streams.offer(name.clone(), stream()).unwrap();
        assert!(matches!(
            streams.offer(name.clone(), stream()),
            Err(Refused::Duplicate(_))
        ));
        let first = streams.claim(&name).await.unwrap();
        // The host comes back, twice.
        streams.offer(name.clone(), stream()).unwrap();
        streams.offer(name.clone(), stream()).unwrap();
        assert_eq!(streams.lock().parked, 1);
        first.replaced.notified().await;
        streams.lost(&name);
        streams.claim(&name).await.unwrap();
        assert_eq!(streams.lock().parked, 0);
        streams.offer(name.clone(), stream()).unwrap();
        streams.release(&name);
        assert_eq!(streams.lock().parked, 0);
        streams.offer(name, stream()).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn parking_is_bounded() {
        let streams = Streams::default();
        for i in 0..MAX_PARKED {
            streams
                .offer(id(&format!("c{i}//stdin")), stream())
                .unwrap();
        }
        assert!(matches!(
            streams.offer(id("more//stdin"), stream()),
            Err(Refused::Full)
        ));
        streams.release(&id("c0//stdin"));
        streams.offer(id("more//stdin"), stream()).unwrap();
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn nobody_waits_for_ever() {
        let streams = Streams::default();
        assert!(streams.claim(&id("c1//stdin")).await.is_none());
        streams.offer(id("c2//stdin"), stream()).unwrap();
        tokio::time::sleep(PARK_DEADLINE * 2).await;
        assert_eq!(streams.lock().parked, 0);
        assert!(streams.lock().by_id.is_empty());
    }
}
