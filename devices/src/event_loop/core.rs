//! The loop's thread: epoll, handlers, and whose event is whose.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Command, Threads};
use crate::virtio::{EventHandler, HandlerId, Interest, Loop, Ready};

/// Epoll data of the wake-up eventfd; registrations count up from one.
const WAKE: u64 = 0;
/// Events taken per `epoll_wait`: enough for a busy VM, small on the stack.
const BATCH: usize = 32;

/// What the loop's thread owns.
pub(super) struct Core {
    table: WatchTable,
    handlers: HashMap<HandlerId, Box<dyn EventHandler>>,
    wake: EventFd,
    inbox: Receiver<Command>,
    threads: Arc<dyn Threads>,
}

impl Core {
    pub(super) fn new(
        wake: EventFd,
        inbox: Receiver<Command>,
        threads: Arc<dyn Threads>,
    ) -> io::Result<Self> {
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

    pub(super) fn run(mut self) {
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
