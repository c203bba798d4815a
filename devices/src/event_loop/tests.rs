use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::testing::{PATIENCE, TestRunner};
use crate::virtio::{Interest, Loop, Ready};

/// Counts bytes, answers each with the running count.
struct Counter {
    stream: UnixStream,
    seen: Arc<AtomicUsize>,
    panic_at: Option<usize>,
}

impl EventHandler for Counter {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(
            self.stream.as_raw_fd(),
            7,
            Interest {
                readable: true,
                writable: false,
            },
        )
    }

    fn ready(&mut self, lp: &mut dyn Loop, token: u64, ready: Ready) {
        assert_eq!(token, 7);
        let mut byte = [0];
        if ready.hangup && io::Read::read(&mut self.stream, &mut byte).unwrap() == 0 {
            lp.forget(self.stream.as_raw_fd());
            return;
        }
        let count = self.seen.fetch_add(1, Ordering::SeqCst) + 1;
        assert_ne!(Some(count), self.panic_at, "as the test wants");
        let _ = io::Read::read(&mut self.stream, &mut byte);
        self.stream
            .write_all(&[u8::try_from(count).unwrap()])
            .unwrap();
    }
}

fn counter(panic_at: Option<usize>) -> (Box<Counter>, UnixStream, Arc<AtomicUsize>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let handler = Counter {
        stream: theirs,
        seen: Arc::clone(&seen),
        panic_at,
    };
    (Box::new(handler), ours, seen)
}

fn ask(mut stream: &UnixStream) -> io::Result<u8> {
    stream.write_all(b"x")?;
    let mut answer = [0];
    io::Read::read_exact(&mut stream, &mut answer)?;
    Ok(answer[0])
}

#[test]
fn handlers_run_until_removed() {
    let runner = TestRunner::start();
    let (handler, stream, _) = counter(None);
    let (other, other_stream, _) = counter(None);
    let id = runner.runner().add(handler).unwrap();
    runner.runner().add(other).unwrap();
    assert_eq!(ask(&stream).unwrap(), 1);
    assert_eq!(ask(&stream).unwrap(), 2);
    runner.runner().remove(id);
    runner.runner().remove(id);
    // The handler was dropped, so its end is closed when `remove` returns.
    ask(&stream).unwrap_err();
    assert_eq!(ask(&other_stream).unwrap(), 1);
    assert!(runner.failures().is_empty());
}

#[test]
fn a_panicking_handler_ends_the_loop_and_nothing_hangs() {
    let mut runner = TestRunner::start();
    let (handler, stream, _) = counter(Some(1));
    let id = runner.runner().add(handler).unwrap();
    ask(&stream).unwrap_err();
    runner.runner().remove(id);
    let (handler, _stream, _) = counter(None);
    runner.runner().add(handler).unwrap_err();
    runner.shutdown();
    assert_eq!(runner.failures(), ["thread test-loop panicked"]);
}

struct Unwatchable;

impl EventHandler for Unwatchable {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(-1, 0, Interest::default())
    }

    fn ready(&mut self, _: &mut dyn Loop, _: u64, _: Ready) {}
}

#[test]
fn a_handler_that_cannot_start_is_refused() {
    let runner = TestRunner::start();
    runner.runner().add(Box::new(Unwatchable)).unwrap_err();
}

#[test]
fn workers_end_on_their_token_and_report_panics() {
    let mut runner = TestRunner::start();
    let wait = |token: StopToken| {
        let mut byte = [0];
        let mut reader = io::PipeReader::from(token.0);
        io::Read::read_exact(&mut reader, &mut byte).unwrap();
    };
    let first = runner.runner().spawn("first", Box::new(wait)).unwrap();
    runner.runner().spawn("second", Box::new(wait)).unwrap();
    let bad = runner
        .runner()
        .spawn("bad", Box::new(|_| panic!("as the test wants")))
        .unwrap();
    runner.runner().join(first);
    runner.runner().join(first);
    runner.runner().join(bad);
    runner.shutdown();
    assert_eq!(runner.failures(), ["thread bad panicked"]);
    runner.runner().spawn("late", Box::new(wait)).unwrap_err();
}

/// Removes itself from its own loop.
struct Suicidal {
    stream: UnixStream,
    runner: Arc<dyn Runner>,
    id: Arc<OnceLock<HandlerId>>,
}

impl EventHandler for Suicidal {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        lp.watch(
            self.stream.as_raw_fd(),
            0,
            Interest {
                readable: true,
                writable: false,
            },
        )
    }

    fn ready(&mut self, _: &mut dyn Loop, _: u64, _: Ready) {
        self.runner.remove(*self.id.get().unwrap());
    }
}

#[test]
fn a_handler_can_remove_itself() {
    let runner = TestRunner::start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let id = Arc::new(OnceLock::new());
    let handler = Suicidal {
        stream: theirs,
        runner: runner.runner(),
        id: Arc::clone(&id),
    };
    id.set(runner.runner().add(Box::new(handler)).unwrap())
        .unwrap();
    ask(&ours).unwrap_err();
}

/// Cannot be started.
struct Stillborn;

impl EventHandler for Stillborn {
    fn start(&mut self, _: &mut dyn Loop) -> io::Result<()> {
        Err(io::Error::other("as the test wants"))
    }

    fn ready(&mut self, _: &mut dyn Loop, _: u64, _: Ready) {}
}

#[test]
fn a_posted_handler_that_does_not_start_is_reported() {
    let runner = TestRunner::start();
    runner
        .runner()
        .add(Box::new(Stillborn))
        .map(drop)
        .unwrap_err();
    assert_eq!(runner.failures(), Vec::<String>::new());
    let id = runner.runner().post(Box::new(Stillborn)).unwrap();
    // After the loop has seen it.
    runner.runner().remove(id);
    assert_eq!(
        runner.failures(),
        ["cannot start a handler: as the test wants"]
    );
}
