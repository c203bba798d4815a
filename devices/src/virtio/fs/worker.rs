//! Threads that take requests from the queues and serve them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::request::{Header, OUT_HEADER_LEN, Staging};
use super::thread;
use crate::virtio::notify;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt, StopToken};

const STOP: u64 = u64::MAX;

/// What the workers of one activation share.
#[derive(Debug)]
pub struct Shared<F: FileSystem + Sync> {
    pub memory: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
    pub queues: Vec<Mutex<ActiveQueue>>,
    pub server: Arc<ServerOf<F>>,
}

/// A FUSE server that can be printed.
pub struct ServerOf<F: FileSystem + Sync>(pub Server<F>);

impl<F: FileSystem + Sync> std::fmt::Debug for ServerOf<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

/// Serves until `stop` is signalled.
pub fn run<F: FileSystem + Sync>(shared: &Shared<F>, stop: &StopToken) {
    if let Err(err) = thread::prepare().and_then(|()| serve(shared, stop)) {
        shared.interrupt.needs_reset(&format!("fs: {err}"));
    }
}

fn serve<F: FileSystem + Sync>(shared: &Shared<F>, stop: &StopToken) -> io::Result<()> {
    let mut staging = Staging::new(&shared.memory)?;
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
fn drain<F: FileSystem + Sync>(
    shared: &Shared<F>,
    queue: &Mutex<ActiveQueue>,
    staging: &mut Staging,
) -> io::Result<()> {
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
            Ok(()) => answer(&shared.server.0, staging, guest, &header),
            Err(err) => staging
                .parts()
                .reply_error(guest, header.unique, err.errno()),
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
fn answer<F: FileSystem + Sync>(
    server: &Server<F>,
    staging: &mut Staging,
    guest: &GuestMemoryMmap<()>,
    header: &Header,
) -> usize {
    // The window for direct access is not offered, so neither are its operations.
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
        Ok(written) => written,
        Err(errno) if header.wants_reply() => {
            staging.parts().reply_error(guest, header.unique, errno)
        }
        Err(_) => 0,
    }
}

fn dispatch<F: FileSystem + Sync>(server: &Server<F>, staging: &mut Staging) -> Option<usize> {
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
