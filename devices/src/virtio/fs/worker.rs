//! Threads that take requests from the queues and serve them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::{FUSE_ATTR_DAX, Opcode};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::request::{Header, OUT_HEADER_LEN, Staging};
use super::share::Share;
use super::thread;
use super::window::BLOCK_SHIFT;
use crate::virtio::notify;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt, StopToken};

const STOP: u64 = u64::MAX;

/// What the workers of one activation share.
#[derive(Debug)]
pub struct Shared {
    pub memory: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
    pub queues: Vec<Mutex<ActiveQueue>>,
    pub served: Arc<Served>,
}

/// A share, and its codec.
pub struct Served {
    pub share: Arc<Share>,
    server: Server<Arc<Share>>,
}

impl Served {
    /// Serves `share`.
    pub fn new(share: Share) -> Self {
        let share = Arc::new(share);
        Self {
            server: Server::new(Arc::clone(&share)),
            share,
        }
    }
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served")
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}

/// Serves until `stop` is signalled.
pub fn run(shared: &Shared, stop: &StopToken) {
    if let Err(err) = thread::prepare().and_then(|()| serve(shared, stop)) {
        shared.interrupt.needs_reset(&format!("fs: {err}"));
    }
}

fn serve(shared: &Shared, stop: &StopToken) -> io::Result<()> {
    let window = shared.served.share.window_memory();
    let mut staging = Staging::new(&shared.memory, window)?;
    let epoll = Epoll::new()?;
    let watch =
        |fd, events, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token));
    watch(stop.0.as_raw_fd(), EventSet::IN, STOP)?;
    for (token, queue) in (0..).zip(&shared.queues) {
        let fd = lock(queue).notify.as_raw_fd();
        // One worker wakes per notification, not all of them.
        watch(fd, EventSet::IN | EventSet::EXCLUSIVE, token)?;
    }
    let mut events = [EpollEvent::default(); 1];
    loop {
        match epoll.wait(-1, &mut events) {
            Ok(0) => continue,
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        }
        let token = events.first().map_or(STOP, EpollEvent::data);
        if token == STOP {
            return Ok(());
        }
        if let Some(queue) = usize::try_from(token)
            .ok()
            .and_then(|index| shared.queues.get(index))
        {
            // Empty if another worker was faster.
            let _ = lock(queue).notify.read();
            drain(shared, queue, &mut staging)?;
        }
    }
}

/// Serves one queue until it is empty. The lock is not held while a request runs.
fn drain(shared: &Shared, queue: &Mutex<ActiveQueue>, staging: &mut Staging) -> io::Result<()> {
    let guest: &GuestMemoryMmap<()> = &shared.memory;
    loop {
        let (head, header, staged) = {
            let mut active = lock(queue);
            let chain = active.queue.iter(guest).map_err(io::Error::other)?.next();
            let more = active
                .queue
                .enable_notification(guest)
                .map_err(io::Error::other)?;
            let Some(chain) = chain else {
                if more {
                    continue;
                }
                return Ok(());
            };
            if more {
                // For another worker, while this one is busy.
                active.notify.write(1)?;
            }
            let head = chain.head_index();
            let (header, staged) = staging.stage(guest, chain);
            (head, header, staged)
        };
        let written = match staged {
            Ok(()) => answer(&shared.served, staging, guest, &header),
            Err(err) => staging
                .parts()
                .reply_status(guest, header.unique, err.errno()),
        };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let mut active = lock(queue);
        active
            .queue
            .add_used(guest, head, written)
            .map_err(io::Error::other)?;
        notify::used(guest, &mut active, &*shared.interrupt).map_err(io::Error::other)?;
    }
}

/// Serves the staged request; returns the length of the reply.
fn answer(
    served: &Served,
    staging: &mut Staging,
    guest: &GuestMemoryMmap<()>,
    header: &Header,
) -> usize {
    let Served { share, server } = served;
    if let Some(done) = share.serve_window(header.opcode, header.node, staging.body()) {
        let status = done.map_or_else(|err| err.raw_os_error().unwrap_or(libc::EIO), |()| 0);
        return staging.parts().reply_status(guest, header.unique, status);
    }
    let unknown = [Opcode::SetupMapping as u32, Opcode::RemoveMapping as u32];
    let result = if unknown.contains(&header.opcode) {
        Err(libc::ENOSYS)
    } else {
        dispatch(server, staging).ok_or(libc::EIO)
    };
    match result {
        // The server does not count its reply to this one.
        Ok(0) if header.opcode == Opcode::Destroy as u32 => {
            OUT_HEADER_LEN.min(staging.parts().writable_len())
        }
        Ok(written) => {
            complete(share, staging, guest, header, written);
            written
        }
        Err(errno) if header.wants_reply() => {
            staging.parts().reply_status(guest, header.unique, errno)
        }
        Err(_) => 0,
    }
}

/// Adds to a reply what the server has no way to say: how the window is divided
/// (`fuse_init_out.map_alignment`), and that a file is for the window
/// (`fuse_attr_out.attr.flags`).
fn complete(
    share: &Share,
    staging: &Staging,
    guest: &GuestMemoryMmap<()>,
    header: &Header,
    written: usize,
) {
    const MAP_ALIGNMENT: usize = OUT_HEADER_LEN + 30;
    const ATTR_FLAGS: usize = OUT_HEADER_LEN + 16 + 84;
    let attributes = [Opcode::Getattr as u32, Opcode::Setattr as u32];
    let parts = staging.parts();
    if attributes.contains(&header.opcode) {
        if written >= ATTR_FLAGS + 4 && share.is_direct(header.node) {
            parts.write(guest, ATTR_FLAGS, &FUSE_ATTR_DAX.to_le_bytes());
        }
    } else if header.opcode == Opcode::Init as u32
        && written >= MAP_ALIGNMENT + 2
        && share.window_memory().is_some()
    {
        parts.write(guest, MAP_ALIGNMENT, &BLOCK_SHIFT.to_le_bytes());
    }
}

fn dispatch(server: &Server<Arc<Share>>, staging: &mut Staging) -> Option<usize> {
    let chain = staging.chain()?;
    let memory: &GuestMemoryMmap<()> = chain.memory();
    let reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
    let writer = VirtioFsWriter::new(memory, chain.clone()).ok()?;
    server
        .handle_message(reader, writer.into(), None, None)
        .ok()
}

fn lock(queue: &Mutex<ActiveQueue>) -> MutexGuard<'_, ActiveQueue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
