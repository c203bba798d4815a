//! One virtqueue: requests in, chains back.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::job::{Job, Step};
use super::request::{self, Kind, Limits, Refusal, Request, Status};
use super::slot::{Counters, Lease, Slot};
use super::{ID_BYTES, MAX_SEGMENTS};
use crate::virtio::chain::Chain;
use crate::virtio::notify::{self, QueueError};
use crate::virtio::vectors::GuestVectors;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

/// Descriptors of a chain: header, segments, status.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS as usize + 2;

/// What all queues of an activation share.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) slot: Arc<Slot>,
    pub(super) id: [u8; ID_BYTES],
    pub(super) read_only: bool,
    /// As negotiated.
    pub(super) features: u64,
}

impl Context {
    /// 5.2.6.2: writes are stable when they complete unless the driver can flush.
    fn durable(&self) -> bool {
        self.features & 1 << VIRTIO_BLK_F_FLUSH == 0
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct RequestQueue {
    context: Context,
    pub(super) active: ActiveQueue,
    chain: Chain,
    /// Used index when the driver was last signalled.
    signalled: u16,
}

impl RequestQueue {
    pub(super) fn new(context: Context, active: ActiveQueue) -> Self {
        Self {
            signalled: active.queue.next_used(),
            context,
            active,
            chain: Chain::default(),
        }
    }

    /// The next job, if the driver has one; takes one off `budget` per request. Requests
    /// that need no I/O are answered here.
    pub(super) fn next(&mut self, budget: &mut usize) -> Result<Option<Job>, QueueError> {
        let memory = Arc::clone(&self.context.memory);
        while let Some(left) = budget.checked_sub(1) {
            let Some(descriptors) = self.active.queue.iter(&*memory)?.next() else {
                if self.active.queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(None);
            };
            *budget = left;
            let head = descriptors.head_index();
            if let Err(err) = self.chain.load(descriptors, MAX_DESCRIPTORS) {
                // There is no telling where the status byte is.
                tracing::debug!(%err, "invalid disk request");
                self.active.queue.add_used(&*memory, head, 0)?;
                continue;
            }
            if let Some(job) = self.begin(head)? {
                return Ok(Some(job));
            }
        }
        Ok(None)
    }

    /// Makes the loaded chain a job, or answers it.
    fn begin(&mut self, head: u16) -> Result<Option<Job>, QueueError> {
        let lease = self.context.slot.lease();
        let limits = Limits {
            sectors: lease
                .as_ref()
                .and_then(Lease::backing)
                .map_or(0, super::Backing::sectors),
            read_only: self.context.read_only,
            features: self.context.features,
        };
        let request = match request::parse(&self.context.memory, &mut self.chain, &limits) {
            Ok(request) => request,
            Err(Refusal::Silent) => {
                self.active.queue.add_used(&*self.context.memory, head, 0)?;
                return Ok(None);
            }
            Err(Refusal::Status(status, code)) => return self.refuse(head, status, code),
        };
        match self.job(head, &request, lease) {
            Ok(job) => match job.next() {
                Step::Again => Ok(Some(job)),
                Step::Done(code) => self.finish(&job, code).map(|()| None),
            },
            Err(Status::Ok) => self
                .answer(head, request.status, ID_BYTES, Status::Ok)
                .map(|()| None),
            Err(code) => self.refuse(head, request.status, code),
        }
    }

    /// A job for the request, or the status of one that needs none.
    fn job(&self, head: u16, request: &Request, lease: Option<Lease>) -> Result<Job, Status> {
        let memory = &self.context.memory;
        let mut data = GuestVectors::new(memory);
        let outside = |_| Status::IoError;
        match request.kind {
            Kind::Read { .. } => data.append(&self.chain.writable).map_err(outside)?,
            Kind::Write { .. } => data.append(&self.chain.readable).map_err(outside)?,
            Kind::GetId => {
                let id = &self.context.id;
                self.chain.writable.write(memory, 0, id).map_err(outside)?;
                return Err(Status::Ok);
            }
            Kind::Flush | Kind::Discard(_) | Kind::WriteZeroes(_) => {}
        }
        Ok(Job::new(
            head,
            request.status,
            request.kind.clone(),
            data,
            self.context.durable(),
            lease.ok_or(Status::IoError)?,
        ))
    }

    /// Answers a finished job.
    pub(super) fn finish(&mut self, job: &Job, code: Status) -> Result<(), QueueError> {
        job.count(code, &self.context.slot.counters);
        self.answer(job.head, job.status, job.writable, code)
    }

    fn refuse(
        &mut self,
        head: u16,
        status: GuestAddress,
        code: Status,
    ) -> Result<Option<Job>, QueueError> {
        Counters::add(&self.context.slot.counters.errors, 1);
        let writable = self.chain.writable.len();
        self.answer(head, status, writable, code).map(|()| None)
    }

    /// Writes the status and gives the chain back. `data` bytes are in front of the status.
    fn answer(
        &mut self,
        head: u16,
        status: GuestAddress,
        data: usize,
        code: Status,
    ) -> Result<(), QueueError> {
        let memory = &*self.context.memory;
        memory
            .write_obj(code.byte(), status)
            .map_err(virtio_queue::Error::GuestMemory)?;
        // 2.7.8.2: the length covers only bytes that were written from the start on, and a
        // failed read has left a gap before the status.
        let written = match code {
            Status::Ok => data.saturating_add(1),
            _ if data == 0 => 1,
            _ => 0,
        };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Ok(self.active.queue.add_used(memory, head, written)?)
    }

    /// Asks the driver not to notify while its requests are being taken anyway.
    pub(super) fn quiet(&mut self) -> Result<(), QueueError> {
        Ok(self
            .active
            .queue
            .disable_notification(&*self.context.memory)?)
    }

    /// Interrupts the driver if it wants that for what was given back.
    pub(super) fn signal(&mut self) -> Result<(), QueueError> {
        let before = self.signalled;
        self.signalled = self.active.queue.next_used();
        notify::used_since(
            &self.context.memory,
            &self.active,
            before,
            &*self.context.interrupt,
        )
    }

    /// Comes back to the queue after the others had their turn.
    pub(super) fn again(&self) -> Result<(), QueueError> {
        self.active
            .notify
            .write(1)
            .map_err(|source| QueueError::Io {
                what: "cannot wake the disk queue",
                source,
            })
    }

    /// The queue cannot go on.
    pub(super) fn fail(&self, err: &QueueError) {
        self.context
            .interrupt
            .needs_reset(&format!("block queue {}: {err}", self.active.index));
    }
}
