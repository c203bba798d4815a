//! One thread that serves many fds: the [`Runner`] behind every in-process device.
//!
//! The `event-manager` crate was tried first and does not fit the contract: its
//! subscribers cannot be removed from another thread with a guarantee that they no longer
//! run (what a driver reset needs), and its registrations are keyed by fd, so a closed
//! and re-used fd number would report to the wrong handler. Plain epoll is as short.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::{EventHandler, HandlerId, Interest, Loop, Ready, Runner, StopToken, WorkerId};

/// How a loop gets its threads: the VM's one helper, or a test's.
pub trait Threads: Send + Sync + fmt::Debug {
    /// Starts `work` on a thread named `name`, with whatever guard the owner wants.
    ///
    /// # Errors
    /// When the thread cannot be created.
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;

    /// Something failed that no caller can be told of.
    fn failed(&self, what: String);
}

/// Epoll data of the wake-up eventfd; registrations count up from one.
const WAKE: u64 = 0;
/// Events taken per `epoll_wait`: enough for a busy VM, small on the stack.
const BATCH: usize = 32;

enum Command {
    Add {
        id: HandlerId,
        handler: Box<dyn EventHandler>,
        /// `None` when the loop's own thread asks: it cannot wait for itself.
        reply: Option<Sender<io::Result<()>>>,
    },
    Remove {
        id: HandlerId,
        /// Dropped once the handler is gone.
        done: Option<Sender<()>>,
    },
    Stop,
}

/// The owner of a loop thread and its workers; dropping it ends and joins them.
#[derive(Debug)]
pub struct EventLoop {
    runner: Arc<LoopRunner>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the loop's thread, named `name`.
    ///
    /// # Errors
    /// When the kernel has no more fds or threads.
    pub fn start(name: &str, threads: Arc<dyn Threads>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let core = Core::new(wake.try_clone()?, inbox, Arc::clone(&threads))?;
        let runner = Arc::new(LoopRunner {
            commands,
            wake,
            threads,
            next_id: AtomicU64::new(1),
            thread: OnceLock::new(),
            workers: Mutex::new(Workers::default()),
        });
        let thread = runner.threads.spawn(name, Box::new(move || core.run()))?;
        // Set before anyone else can hold the runner.
        let _ = runner.thread.set(thread.thread().id());
        Ok(Self {
            runner,
            thread: Some(thread),
        })
    }

    /// The handle that devices get.
    #[must_use]
    pub fn runner(&self) -> Arc<dyn Runner> {
        Arc::clone(&self.runner) as Arc<dyn Runner>
    }

    /// Ends the workers, then the loop, dropping all handlers; joins every thread.
    pub fn shutdown(&mut self) {
        let workers = {
            let mut table = self.runner.lock_workers();
            table.closed = true;
            std::mem::take(&mut table.running)
        };
        // Signal all before joining the first: they end side by side.
        for worker in workers.values() {
            worker.signal();
        }
        for (_, worker) in workers {
            worker.join();
        }
        let _ = self.runner.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            join_unless_self(thread);
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn join_unless_self(thread: JoinHandle<()>) {
    if thread.thread().id() != std::thread::current().id() {
        // A panic was reported by the thread's own guard.
        let _ = thread.join();
    }
}

#[derive(Debug)]
struct Worker {
    stop: io::PipeWriter,
    thread: JoinHandle<()>,
}

impl Worker {
    fn signal(&self) {
        // Fails only when the worker is gone already.
        let _ = (&self.stop).write(&[1]);
    }

    fn join(self) {
        self.signal();
        join_unless_self(self.thread);
    }
}

#[derive(Debug, Default)]
struct Workers {
    running: HashMap<WorkerId, Worker>,
    closed: bool,
}

#[derive(Debug)]
struct LoopRunner {
    commands: Sender<Command>,
    wake: EventFd,
    threads: Arc<dyn Threads>,
    next_id: AtomicU64,
    thread: OnceLock<ThreadId>,
    workers: Mutex<Workers>,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { id, .. } => write!(f, "Add({})", id.0),
            Self::Remove { id, .. } => write!(f, "Remove({})", id.0),
            Self::Stop => f.write_str("Stop"),
        }
    }
}

impl LoopRunner {
    fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn on_loop_thread(&self) -> bool {
        self.thread.get() == Some(&std::thread::current().id())
    }

    fn lock_workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands
            .send(command)
            .map_err(|_| io::Error::other("the event loop has ended"))?;
        match self.wake.write(1) {
            // The counter is full: the loop has not woken yet, but it will.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Runner for LoopRunner {
    fn add(&self, handler: Box<dyn EventHandler>) -> io::Result<HandlerId> {
        let id = HandlerId(self.id());
        if self.on_loop_thread() {
            self.send(Command::Add {
                id,
                handler,
                reply: None,
            })?;
            return Ok(id);
        }
        let (reply, started) = mpsc::channel();
        self.send(Command::Add {
            id,
            handler,
            reply: Some(reply),
        })?;
        started
            .recv()
            .map_err(|_| io::Error::other("the event loop has ended"))??;
        Ok(id)
    }

    fn remove(&self, id: HandlerId) {
        if self.on_loop_thread() {
            let _ = self.send(Command::Remove { id, done: None });
            return;
        }
        let (done, gone) = mpsc::channel();
        if self
            .send(Command::Remove {
                id,
                done: Some(done),
            })
            .is_ok()
        {
            // Returns on the loop's drop of `done`, also when the loop ends first.
            let _ = gone.recv();
        }
    }

    fn spawn(&self, name: &str, work: Box<dyn FnOnce(StopToken) + Send>) -> io::Result<WorkerId> {
        let (stop_reader, stop) = io::pipe()?;
        let token = StopToken(OwnedFd::from(stop_reader));
        let mut workers = self.lock_workers();
        if workers.closed {
            return Err(io::Error::other("the event loop has ended"));
        }
        let thread = self.threads.spawn(name, Box::new(move || work(token)))?;
        let id = WorkerId(self.id());
        workers.running.insert(id, Worker { stop, thread });
        Ok(id)
    }

    fn join(&self, id: WorkerId) {
        let worker = self.lock_workers().running.remove(&id);
        if let Some(worker) = worker {
            worker.join();
        }
    }
}

/// What the loop's thread owns.
struct Core {
    table: WatchTable,
    handlers: HashMap<HandlerId, Box<dyn EventHandler>>,
    wake: EventFd,
    inbox: Receiver<Command>,
    threads: Arc<dyn Threads>,
}

impl Core {
    fn new(wake: EventFd, inbox: Receiver<Command>, threads: Arc<dyn Threads>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, WAKE),
        )?;
        Ok(Self {
            table: WatchTable {
                epoll,
                watches: HashMap::new(),
                next: WAKE,
            },
            handlers: HashMap::new(),
            wake,
            inbox,
            threads,
        })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let count = match self.table.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => {
                    self.threads.failed(format!("epoll_wait: {err}"));
                    return;
                }
            };
            for event in events.iter().take(count) {
                if event.data() == WAKE {
                    let _ = self.wake.read();
                } else {
                    self.dispatch(event.data(), event.event_set());
                }
            }
            // After every batch, so that a handler's own requests take effect promptly.
            if self.commands().is_break() {
                return;
            }
        }
    }

    fn dispatch(&mut self, registration: u64, events: EventSet) {
        // Forgotten earlier in the same batch.
        let Some(watch) = self.table.watches.get(&registration) else {
            return;
        };
        let (id, token) = (watch.handler, watch.token);
        let Some(handler) = self.handlers.get_mut(&id) else {
            return;
        };
        let ready = Ready {
            readable: events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP),
            writable: events.contains(EventSet::OUT),
            hangup: events.intersects(EventSet::HANG_UP | EventSet::ERROR),
        };
        let mut view = HandlerLoop {
            table: &mut self.table,
            handler: id,
        };
        handler.ready(&mut view, token, ready);
    }

    fn commands(&mut self) -> std::ops::ControlFlow<()> {
        use std::ops::ControlFlow::{Break, Continue};
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Add { id, handler, reply }) => {
                    let result = self.add(id, handler);
                    match (reply, result) {
                        (Some(reply), result) => {
                            let _ = reply.send(result);
                        }
                        (None, Err(err)) => {
                            self.threads
                                .failed(format!("cannot start a handler: {err}"));
                        }
                        (None, Ok(())) => {}
                    }
                }
                Ok(Command::Remove { id, done }) => {
                    self.table.forget_handler(id);
                    drop(self.handlers.remove(&id));
                    drop(done);
                }
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return Break(()),
                Err(mpsc::TryRecvError::Empty) => return Continue(()),
            }
        }
    }

    fn add(&mut self, id: HandlerId, mut handler: Box<dyn EventHandler>) -> io::Result<()> {
        let mut view = HandlerLoop {
            table: &mut self.table,
            handler: id,
        };
        if let Err(err) = handler.start(&mut view) {
            self.table.forget_handler(id);
            return Err(err);
        }
        self.handlers.insert(id, handler);
        Ok(())
    }
}

#[derive(Debug)]
struct Watch {
    handler: HandlerId,
    fd: RawFd,
    token: u64,
}

/// Watched fds by registration number, which epoll hands back with each event. Numbers
/// are never re-used, fds are: a stale event cannot reach the wrong handler.
#[derive(Debug)]
struct WatchTable {
    epoll: Epoll,
    watches: HashMap<u64, Watch>,
    next: u64,
}

impl WatchTable {
    fn find(&self, handler: HandlerId, fd: RawFd) -> Option<u64> {
        self.watches
            .iter()
            .find(|(_, watch)| watch.handler == handler && watch.fd == fd)
            .map(|(registration, _)| *registration)
    }

    fn forget(&mut self, registration: u64) {
        if let Some(watch) = self.watches.remove(&registration) {
            // EBADF when the handler closed the fd first; the kernel forgot it then.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, watch.fd, EpollEvent::default());
        }
    }

    fn forget_handler(&mut self, handler: HandlerId) {
        let gone: Vec<u64> = self
            .watches
            .iter()
            .filter(|(_, watch)| watch.handler == handler)
            .map(|(registration, _)| *registration)
            .collect();
        for registration in gone {
            self.forget(registration);
        }
    }
}

/// The loop as one handler sees it.
struct HandlerLoop<'a> {
    table: &'a mut WatchTable,
    handler: HandlerId,
}

fn event_set(interest: Interest) -> EventSet {
    let mut events = EventSet::empty();
    if interest.readable {
        events |= EventSet::IN | EventSet::READ_HANG_UP;
    }
    if interest.writable {
        events |= EventSet::OUT;
    }
    events
}

impl Loop for HandlerLoop<'_> {
    fn watch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        let registration = self.table.next.wrapping_add(1);
        self.table.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(event_set(interest), registration),
        )?;
        self.table.next = registration;
        self.table.watches.insert(
            registration,
            Watch {
                handler: self.handler,
                fd,
                token,
            },
        );
        Ok(())
    }

    fn rewatch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        let registration = self
            .table
            .find(self.handler, fd)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        self.table.epoll.ctl(
            ControlOperation::Modify,
            fd,
            EpollEvent::new(event_set(interest), registration),
        )?;
        if let Some(watch) = self.table.watches.get_mut(&registration) {
            watch.token = token;
        }
        Ok(())
    }

    fn forget(&mut self, fd: RawFd) {
        if let Some(registration) = self.table.find(self.handler, fd) {
            self.table.forget(registration);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::testing::{PATIENCE, TestRunner};

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
}
