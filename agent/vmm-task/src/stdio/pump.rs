//! Copies between a process's ends and the host's streams.
//!
//! Order at the end of a process: everything it wrote before it ended is sent, then the
//! stream is half-closed, so the host reads end of file right after the last byte; the
//! exit event follows. A host that does not read cannot hold the event back for more than
//! [`EXIT_DRAIN`]; the bytes still come after it. A grandchild that keeps an output open
//! is cut off [`GRACE`] after the process it came from.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc::Stdio;
use agent_api::stream::{StreamId, StreamKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use super::AgentEnds;
use super::console::clamp;
use crate::fd::Fd;
use crate::streams::{Stream, Streams};
use crate::sys;

/// Bytes copied at once; also what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// How long the exit event waits for the host to take the output.
pub const EXIT_DRAIN: Duration = Duration::from_secs(2);
/// How long an output may stay open after its process has ended.
const GRACE: Duration = Duration::from_millis(250);
/// The most a pipe can hold (`/proc/sys/fs/pipe-max-size`), so what may still be read after
/// [`GRACE`].
const MAX_PIPE: usize = 1024 * 1024;
/// How long `CloseStdin` waits for a stream the host has not opened yet.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// What a terminal in its default mode takes for end of file.
const EOT: u8 = 4;

/// Names a process in streams and logs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessName {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the init process.
    pub exec: String,
}

impl ProcessName {
    fn stream(&self, kind: StreamKind) -> StreamId {
        StreamId {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            kind,
        }
    }
}

impl fmt::Display for ProcessName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.container)?;
        if !self.exec.is_empty() {
            write!(f, "/{}", self.exec)?;
        }
        Ok(())
    }
}

/// The copying tasks of one process; they end with this value.
#[derive(Debug)]
pub struct Pumps {
    exited: watch::Sender<bool>,
    close_stdin: watch::Sender<bool>,
    drained: Option<mpsc::Receiver<()>>,
    tty: Option<Arc<OwnedFd>>,
    names: Vec<StreamId>,
    streams: Streams,
    tasks: JoinSet<()>,
}

impl Pumps {
    /// Starts copying.
    pub fn start(
        process: &ProcessName,
        ends: AgentEnds,
        terminal: bool,
        streams: &Streams,
    ) -> Self {
        let (exited, exit_seen) = watch::channel(false);
        let (close_stdin, close_seen) = watch::channel(false);
        let (busy, drained) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        let mut names = Vec::new();
        let tty = ends.stdout.as_ref().filter(|_| terminal).map(Fd::shared);
        let outputs = [
            (ends.stdout, StreamKind::Stdout),
            (ends.stderr, StreamKind::Stderr),
        ];
        for (end, kind) in outputs {
            let Some(from) = end else { continue };
            let id = process.stream(kind);
            names.push(id.clone());
            let source = Source {
                fd: from,
                exited: exit_seen.clone(),
                grace: None,
                late: 0,
            };
            let (streams, busy) = (streams.clone(), busy.clone());
            tasks.spawn(async move {
                output(source, &id, &streams).await;
                drop(busy);
            });
        }
        if let Some(to) = ends.stdin {
            let id = process.stream(StreamKind::Stdin);
            names.push(id.clone());
            let streams = streams.clone();
            tasks.spawn(async move { input(to, terminal, &id, &streams, close_seen).await });
        }
        Self {
            exited,
            close_stdin,
            drained: Some(drained),
            tty,
            names,
            streams: streams.clone(),
            tasks,
        }
    }

    /// Ends the streams of a process that never ran: each is closed when the host opens it.
    pub fn refuse(process: &ProcessName, wanted: &Stdio, streams: &Streams) -> Self {
        let mut pumps = Self::start(process, AgentEnds::default(), false, streams);
        let kinds = [
            (wanted.stdin, StreamKind::Stdin),
            (wanted.stdout || wanted.terminal, StreamKind::Stdout),
            (wanted.stderr, StreamKind::Stderr),
        ];
        for (_, kind) in kinds.into_iter().filter(|(wanted, _)| *wanted) {
            let id = process.stream(kind);
            pumps.names.push(id.clone());
            let streams = streams.clone();
            pumps
                .tasks
                .spawn(async move { drop(streams.claim(&id).await) });
        }
        pumps
    }

    /// Tells the pumps that the process has ended. The future is ready when the host has all
    /// output, or after [`EXIT_DRAIN`].
    pub fn process_exited(&mut self) -> impl Future<Output = ()> + Send + 'static {
        self.exited.send_replace(true);
        self.close_stdin.send_replace(true);
        self.tty = None;
        let drained = self.drained.take();
        async move {
            if let Some(mut drained) = drained {
                // Late is fine: the rest follows the event.
                let _ = timeout(EXIT_DRAIN, drained.recv()).await;
            }
        }
    }

    /// Lets the process read end of file after what was sent.
    pub fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }

    /// Sets the terminal's size; `false` when the process has none.
    pub fn resize(&self, width: u32, height: u32) -> io::Result<bool> {
        match &self.tty {
            Some(tty) => sys::set_window_size(tty, clamp(width), clamp(height)).map(|()| true),
            None => Ok(false),
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for name in &self.names {
            self.streams.release(name);
        }
    }
}

/// An output end, read until the process and its data are gone.
struct Source {
    fd: Fd,
    exited: watch::Receiver<bool>,
    /// Set once the process has ended.
    grace: Option<Instant>,
    /// Bytes read after `grace`.
    late: usize,
}

impl Source {
    /// The next bytes; 0 at the end.
    async fn next(&mut self, buf: &mut [u8]) -> usize {
        let read = match self.grace {
            None => {
                let ended = tokio::select! {
                    biased;
                    read = self.fd.read(buf) => Ok(read),
                    _ = self.exited.wait_for(|ended| *ended) => Err(()),
                };
                match ended {
                    Ok(read) => read,
                    Err(()) => {
                        let grace = Instant::now().checked_add(GRACE);
                        self.grace = grace;
                        self.rest(buf, grace).await
                    }
                }
            }
            grace => self.rest(buf, grace).await,
        };
        // A terminal reports the end as EIO; other errors are the end as well.
        read.unwrap_or(0)
    }

    async fn rest(&mut self, buf: &mut [u8], grace: Option<Instant>) -> io::Result<usize> {
        let Some(grace) = grace else { return Ok(0) };
        if let Some(n) = self.fd.try_read(buf)? {
            if Instant::now() > grace {
                self.late = self.late.saturating_add(n);
                if self.late > MAX_PIPE {
                    return Ok(0);
                }
            }
            return Ok(n);
        }
        timeout_at(grace, self.fd.read(buf)).await.unwrap_or(Ok(0))
    }
}

/// Copies one output until the process and its data are gone.
async fn output(mut source: Source, id: &StreamId, streams: &Streams) {
    let mut buf = vec![0; CHUNK];
    // What a host that went away may not have got: a piece may come twice, none is lost.
    let mut pending = 0;
    loop {
        let Some(Stream {
            mut fd, replaced, ..
        }) = streams.claim(id).await
        else {
            warn!(stream = %id, "the host did not open it; output is discarded");
            while source.next(&mut buf).await > 0 {}
            return;
        };
        loop {
            if pending == 0 {
                pending = tokio::select! {
                    biased;
                    () = replaced.notified() => break,
                    n = source.next(&mut buf) => n,
                };
                if pending == 0 {
                    fd.finish();
                    return;
                }
            }
            let written = tokio::select! {
                biased;
                () = replaced.notified() => break,
                written = fd.write_all(buf.get(..pending).unwrap_or_default()) => written,
            };
            if let Err(e) = written {
                debug!(stream = %id, "lost: {e}");
                break;
            }
            pending = 0;
        }
        // The host went away, perhaps to come back: the process waits on a full pipe.
        streams.lost(id);
        if source.grace.is_some() {
            return;
        }
    }
}

/// Copies the host's input until it ends.
async fn input(
    mut to: Fd,
    terminal: bool,
    id: &StreamId,
    streams: &Streams,
    mut close: watch::Receiver<bool>,
) {
    let mut buf = vec![0; CHUNK];
    'streams: loop {
        let claimed = tokio::select! {
            stream = streams.claim(id) => stream,
            () = async {
                let _ = close.wait_for(|close| *close).await;
                tokio::time::sleep(CLOSE_DEADLINE).await;
            } => None,
        };
        let Some(Stream {
            mut fd,
            head,
            replaced,
        }) = claimed
        else {
            break;
        };
        if to.write_all(&head).await.is_err() {
            return;
        }
        loop {
            let read = tokio::select! {
                biased;
                () = replaced.notified() => {
                    streams.lost(id);
                    continue 'streams;
                }
                read = fd.read(&mut buf) => Some(read),
                _ = close.wait_for(|close| *close) => None,
            };
            let Some(read) = read else {
                // What has arrived belongs to the process; then it is over.
                while let Ok(Some(n @ 1..)) = fd.try_read(&mut buf) {
                    if to
                        .write_all(buf.get(..n).unwrap_or_default())
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                break 'streams;
            };
            match read {
                Ok(0) => break 'streams,
                Ok(n) => {
                    if to
                        .write_all(buf.get(..n).unwrap_or_default())
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                Err(e) => {
                    debug!(stream = %id, "lost: {e}");
                    streams.lost(id);
                    break;
                }
            }
        }
    }
    if terminal {
        // A process that is gone needs no end of file.
        let _ = to.write_all(&[EOT]).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;
    use crate::net::Endpoint;

    struct Bed {
        streams: Streams,
        path: PathBuf,
        _dir: tempfile::TempDir,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let streams = Streams::default();
            let listener = Endpoint::Unix(path.clone()).listen().unwrap();
            tokio::spawn(streams.clone().serve(listener, None));
            Self {
                streams,
                path,
                _dir: dir,
            }
        }

        fn connect(&self, name: &str) -> UnixStream {
            let mut s = UnixStream::connect(&self.path).unwrap();
            writeln!(s, "{name}").unwrap();
            s
        }
    }

    fn name() -> ProcessName {
        ProcessName {
            container: "c".into(),
            exec: String::new(),
        }
    }

    fn out_pipe() -> (AgentEnds, std::fs::File) {
        let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let ends = AgentEnds {
            stdout: Some(Fd::from_blocking(r).unwrap()),
            ..AgentEnds::default()
        };
        (ends, w.into())
    }

    async fn read_all(mut s: UnixStream) -> Vec<u8> {
        tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            s.read_to_end(&mut all).unwrap();
            all
        })
        .await
        .unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn output_arrives_whole_and_then_ends() {
        let bed = Bed::new();
        let (ends, mut w) = out_pipe();
        let mut pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let host = bed.connect("c//stdout");
        let data = vec![b'x'; 1 << 20];
        let expected = data.clone();
        let writer = tokio::task::spawn_blocking(move || w.write_all(&data).unwrap());
        let got = tokio::spawn(read_all(host));
        writer.await.unwrap();
        pumps.process_exited().await;
        assert_eq!(got.await.unwrap(), expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_grandchild_with_the_output_open_does_not_hold_the_exit_back() {
        let bed = Bed::new();
        let (ends, mut held) = out_pipe();
        let mut pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let host = bed.connect("c//stdout");
        held.write_all(b"before").unwrap();
        let begun = Instant::now();
        pumps.process_exited().await;
        assert!(begun.elapsed() < EXIT_DRAIN, "{:?}", begun.elapsed());
        assert_eq!(read_all(host).await, b"before");
        assert!(held.write_all(b"after").is_err(), "the pipe is closed");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_host_that_does_not_read_delays_the_exit_only_so_long() {
        let bed = Bed::new();
        let (ends, mut w) = out_pipe();
        let mut pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let host = bed.connect("c//stdout");
        let writer = tokio::task::spawn_blocking(move || w.write_all(&vec![b'y'; 1 << 20]));
        let begun = Instant::now();
        tokio::time::sleep(Duration::from_millis(50)).await;
        pumps.process_exited().await;
        assert!(begun.elapsed() >= EXIT_DRAIN);
        // What was written before still arrives, late.
        let got = tokio::spawn(read_all(host));
        let _ = writer.await.unwrap();
        assert!(got.await.unwrap().len() >= CHUNK);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn input_ends_with_the_hosts_half_close() {
        let bed = Bed::new();
        let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let ends = AgentEnds {
            stdin: Some(Fd::from_blocking(w).unwrap()),
            ..AgentEnds::default()
        };
        let _pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let mut host = bed.connect("c//stdin");
        host.write_all(b"hello").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let text =
            tokio::task::spawn_blocking(move || std::io::read_to_string(std::fs::File::from(r)));
        assert_eq!(text.await.unwrap().unwrap(), "hello");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn close_stdin_comes_after_what_was_sent() {
        let bed = Bed::new();
        let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let ends = AgentEnds {
            stdin: Some(Fd::from_blocking(w).unwrap()),
            ..AgentEnds::default()
        };
        let pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let mut host = bed.connect("c//stdin");
        host.write_all(&vec![b'z'; 100_000]).unwrap();
        pumps.close_stdin();
        let text =
            tokio::task::spawn_blocking(move || std::io::read_to_string(std::fs::File::from(r)));
        assert_eq!(text.await.unwrap().unwrap().len(), 100_000);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_host_that_comes_back_gets_the_rest() {
        let bed = Bed::new();
        let (ends, mut w) = out_pipe();
        let mut pumps = Pumps::start(&name(), ends, false, &bed.streams);
        let mut first = bed.connect("c//stdout");
        w.write_all(b"one").unwrap();
        let mut buf = [0; 3];
        tokio::task::yield_now().await;
        first = tokio::task::spawn_blocking(move || {
            first.read_exact(&mut buf).unwrap();
            first
        })
        .await
        .unwrap();
        drop(first);
        w.write_all(b"lost").unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let second = bed.connect("c//stdout");
        let reader = tokio::spawn(read_all(second));
        tokio::time::sleep(Duration::from_millis(50)).await;
        w.write_all(b"two").unwrap();
        drop(w);
        pumps.process_exited().await;
        assert_eq!(reader.await.unwrap(), b"losttwo");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_host_that_opens_a_stream_anew_gets_what_comes_then() {
        let bed = Bed::new();
        let (ends, mut w) = out_pipe();
        let mut pumps = Pumps::start(&name(), ends, false, &bed.streams);
        // Never closed: to the guest it looks alive.
        let _dead = bed.connect("c//stdout");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let reader = tokio::spawn(read_all(bed.connect("c//stdout")));
        tokio::time::sleep(Duration::from_millis(50)).await;
        w.write_all(b"here").unwrap();
        drop(w);
        pumps.process_exited().await;
        assert_eq!(reader.await.unwrap(), b"here");
    }

    #[test]
    fn names_read_well() {
        let mut n = name();
        assert_eq!(n.to_string(), "c");
        n.exec = "e".into();
        assert_eq!(n.to_string(), "c/e");
    }
}
