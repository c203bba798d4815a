//! The request queue on the VM's event loop (virtio 1.2, 5.15.6).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::handle::Shared;
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, RESPONSE_LEN, Request};
use crate::virtio::chain::Chain;
use crate::virtio::release::PageReleaser;
use crate::virtio::serve::{Answer, Descriptors, ServeError, serve};
use crate::virtio::{ActiveQueue, EventHandler, GuestMemory, Interest, Interrupt, Loop, Ready};

/// Requests answered before other handlers get their turn.
const BUDGET: usize = 8;
/// Most descriptors that a request and its response may be cut into.
const MAX_DESCRIPTORS: usize = 16;

/// What one activation runs on the loop.
pub(super) struct Handler {
    pub(super) shared: Arc<Shared>,
    pub(super) releaser: Arc<dyn PageReleaser>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) queue: ActiveQueue,
}

impl EventHandler for Handler {
    fn start(&mut self, lp: &mut dyn Loop) -> io::Result<()> {
        // Requests queued already, and notifications from before a snapshot.
        self.queue.notify.write(1)?;
        lp.watch(
            self.queue.notify.as_raw_fd(),
            0,
            Interest {
                readable: true,
                writable: false,
            },
        )
    }

    fn ready(&mut self, lp: &mut dyn Loop, _token: u64, _ready: Ready) {
        let _ = self.queue.notify.read();
        let result = serve(
            &self.memory,
            &mut self.queue,
            &*self.interrupt,
            BUDGET,
            |memory, chain| answer(&self.shared, &*self.releaser, memory, chain),
        );
        if let Err(err) = result {
            lp.forget(self.queue.notify.as_raw_fd());
            self.interrupt.needs_reset(&format!("mem: {err}"));
        }
    }
}

fn answer(
    shared: &Shared,
    releaser: &dyn PageReleaser,
    memory: &GuestMemoryMmap<()>,
    descriptors: Descriptors<'_>,
) -> Result<Answer, ServeError> {
    let mut chain = Chain::default();
    chain.load(descriptors, MAX_DESCRIPTORS)?;
    let mut request = [0; REQUEST_BYTES];
    chain.readable.read(memory, 0, &mut request)?;
    // Room for the response first: what was done cannot be left unsaid.
    let mut room = [0; RESPONSE_BYTES];
    chain.writable.read(memory, 0, &mut room)?;
    let response = shared.handle(Request::parse(&request), releaser);
    chain.writable.write(memory, 0, &response.to_bytes())?;
    Ok(Answer::Used(RESPONSE_LEN))
}
