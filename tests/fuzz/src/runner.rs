//! An event loop that runs only when it is told to.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use devices::virtio::{
    EventHandler, HandlerId, Interest, Loop, Ready, Runner, StopToken, WorkerId,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Handlers that are called from [`InlineRunner::turn`]; workers are real threads.
pub struct InlineRunner {
    handlers: Mutex<Vec<Entry>>,
    workers: Mutex<Vec<(WorkerId, Worker)>>,
    next: AtomicU64,
}

struct Entry {
    id: HandlerId,
    /// Away while it runs.
    handler: Option<Box<dyn EventHandler>>,
    watches: Vec<Watch>,
}

#[derive(Clone, Copy)]
struct Watch {
    fd: RawFd,
    token: u64,
    interest: Interest,
}

struct Worker {
    stop: io::PipeWriter,
    thread: JoinHandle<()>,
}

impl Default for InlineRunner {
    fn default() -> Self {
        // As in every Rust program, but libFuzzer's `main` is none: workers may have ended
        // when they are told to.
        // SAFETY: no handler.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.unwrap();
        Self {
            handlers: Mutex::default(),
            workers: Mutex::default(),
            next: AtomicU64::default(),
        }
    }
}

impl InlineRunner {
    /// Waits up to `patience` milliseconds for something to be ready and lets one handler
    /// deal with it; false when nothing was.
    pub fn turn(&self, patience: u16) -> bool {
        let watches: Vec<_> = self
            .handlers
            .lock()
            .unwrap()
            .iter()
            .flat_map(|entry| entry.watches.iter().map(|watch| (entry.id, *watch)))
            .collect();
        let mut fds: Vec<_> = watches
            .iter()
            .map(|(_, watch)| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, watch.interest.readable);
                flags.set(PollFlags::POLLOUT, watch.interest.writable);
                // SAFETY: a handler keeps what it watches open until it forgets it.
                PollFd::new(unsafe { BorrowedFd::borrow_raw(watch.fd) }, flags)
            })
            .collect();
        match poll(&mut fds, PollTimeout::from(patience)) {
            Ok(_) => {}
            // The fuzzer's own alarm.
            Err(Errno::EINTR) => return true,
            Err(err) => panic!("poll: {err}"),
        }
        let ready = fds.iter().zip(&watches).find_map(|(fd, (id, watch))| {
            let events = fd.revents()?;
            assert!(
                !events.contains(PollFlags::POLLNVAL),
                "a closed fd is still watched"
            );
            let ready = Ready {
                readable: events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP),
                writable: events.contains(PollFlags::POLLOUT),
                hangup: events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR),
            };
            (!events.is_empty()).then_some((*id, watch.token, ready))
        });
        let Some((id, token, ready)) = ready else {
            return false;
        };
        self.with(id, |handler, view| handler.ready(view, token, ready));
        true
    }

    fn with(&self, id: HandlerId, work: impl FnOnce(&mut dyn EventHandler, &mut View)) {
        let Some((mut handler, watches)) = self.entry(id, |entry| {
            (entry.handler.take(), std::mem::take(&mut entry.watches))
        }) else {
            return;
        };
        let mut view = View(watches);
        if let Some(handler) = &mut handler {
            work(&mut **handler, &mut view);
        }
        // None when the handler removed itself.
        self.entry(id, |entry| {
            entry.handler = handler.take();
            entry.watches = view.0;
        });
    }

    fn entry<R>(&self, id: HandlerId, work: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        let mut handlers = self.handlers.lock().unwrap();
        handlers.iter_mut().find(|entry| entry.id == id).map(work)
    }

    fn id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

impl std::fmt::Debug for InlineRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InlineRunner")
    }
}

impl Runner for InlineRunner {
    fn add(&self, mut handler: Box<dyn EventHandler>) -> io::Result<HandlerId> {
        let mut view = View(Vec::new());
        handler.start(&mut view)?;
        let id = HandlerId(self.id());
        self.handlers.lock().unwrap().push(Entry {
            id,
            handler: Some(handler),
            watches: view.0,
        });
        Ok(id)
    }

    fn remove(&self, id: HandlerId) {
        let mut handlers = self.handlers.lock().unwrap();
        let place = handlers.iter().position(|entry| entry.id == id);
        let entry = place.map(|place| handlers.swap_remove(place));
        drop(handlers);
        drop(entry);
    }

    fn spawn(&self, name: &str, work: Box<dyn FnOnce(StopToken) + Send>) -> io::Result<WorkerId> {
        let (token, stop) = io::pipe()?;
        let token = StopToken(OwnedFd::from(token));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(token))?;
        let id = WorkerId(self.id());
        self.workers
            .lock()
            .unwrap()
            .push((id, Worker { stop, thread }));
        Ok(id)
    }

    fn join(&self, id: WorkerId) {
        let mut workers = self.workers.lock().unwrap();
        let place = workers.iter().position(|(worker, _)| *worker == id);
        let worker = place.map(|place| workers.swap_remove(place).1);
        drop(workers);
        if let Some(worker) = worker {
            let _ = io::Write::write(&mut &worker.stop, &[1]);
            // A panic has ended the process by now.
            let _ = worker.thread.join();
        }
    }
}

struct View(Vec<Watch>);

impl Loop for View {
    fn watch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        assert!(
            self.0.iter().all(|watch| watch.fd != fd),
            "an fd is watched twice"
        );
        self.0.push(Watch {
            fd,
            token,
            interest,
        });
        Ok(())
    }

    fn rewatch(&mut self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        let watch = self.0.iter_mut().find(|watch| watch.fd == fd);
        let watch = watch.ok_or(io::ErrorKind::NotFound)?;
        *watch = Watch {
            fd,
            token,
            interest,
        };
        Ok(())
    }

    fn forget(&mut self, fd: RawFd) {
        self.0.retain(|watch| watch.fd != fd);
    }
}
