//! Operations through io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::super::QUEUE_SIZE;
use super::super::job::{Job, Operation};

/// A ring for one queue. It outlives activations, so that nothing has to be set up once
/// the VM's threads are confined.
#[derive(Clone)]
pub(in super::super) struct Ring(Arc<Mutex<IoUring>>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    /// A ring with room for all requests of a queue.
    ///
    /// # Errors
    /// Says why the kernel, its configuration or a seccomp filter does not let us.
    pub(in super::super) fn new() -> Result<Self, String> {
        let ring = IoUring::builder()
            .dontfork()
            .build(u32::from(QUEUE_SIZE))
            .map_err(|err| format!("io_uring_setup: {err}"))?;
        if !ring.params().is_feature_nodrop() {
            return Err("the kernel's io_uring can lose completions".to_owned());
        }
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|err| format!("io_uring_register: {err}"))?;
        let needed = [
            ("READV", opcode::Readv::CODE),
            ("WRITEV", opcode::Writev::CODE),
            ("WRITE", opcode::Write::CODE),
            ("FSYNC", opcode::Fsync::CODE),
            ("FALLOCATE", opcode::Fallocate::CODE),
        ];
        for (name, code) in needed {
            if !probe.is_supported(code) {
                return Err(format!("the kernel's io_uring lacks {name}"));
            }
        }
        Ok(Self(Arc::new(Mutex::new(ring))))
    }

    /// Readable when there are completions.
    pub(in super::super) fn fd(&self) -> RawFd {
        self.lock().as_raw_fd()
    }

    fn lock(&self) -> MutexGuard<'_, IoUring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The jobs of one activation that the kernel works on. Dropping it waits for all of them,
/// so that guest memory is not written afterwards.
#[derive(Debug)]
pub(in super::super) struct InFlight {
    ring: Ring,
    /// A job stays here, unchanged, from its submission to its completion.
    jobs: Vec<Option<Job>>,
    free: Vec<u16>,
    completed: VecDeque<(u64, i32)>,
}

impl InFlight {
    pub(in super::super) fn new(ring: Ring) -> Self {
        Self {
            ring,
            jobs: (0..QUEUE_SIZE).map(|_| None).collect(),
            free: (0..QUEUE_SIZE).rev().collect(),
            completed: VecDeque::new(),
        }
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.free.len() == self.jobs.len()
    }

    /// Whether no more jobs fit.
    pub(in super::super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Queues the job's current operation. Gives the job back when there is no room, it has
    /// no operation or lost its backing.
    pub(in super::super) fn start(&mut self, job: Job) -> Result<(), Job> {
        let Some(index) = self.free.pop() else {
            return Err(job);
        };
        let Some(place) = self.jobs.get_mut(usize::from(index)) else {
            return Err(job);
        };
        let job = place.insert(job);
        let pushed = entry(job).is_some_and(|entry| {
            let entry = entry.user_data(u64::from(index));
            let mut ring = self.ring.lock();
            // SAFETY: everything the entry points to (the vectors, the guest memory behind
            // them, the file) is owned by the job, which stays in `jobs` until its
            // completion is taken; `Drop` waits for those and leaks what it cannot wait for.
            unsafe { ring.submission().push(&entry) }.is_ok()
        });
        if pushed {
            return Ok(());
        }
        self.free.push(index);
        match place.take() {
            Some(job) => Err(job),
            // It was inserted above.
            None => Ok(()),
        }
    }

    /// Hands what was queued to the kernel. `false` when it wants us to take completions
    /// first and be called again.
    ///
    /// # Errors
    /// As io_uring_enter(2).
    pub(in super::super) fn submit(&mut self) -> io::Result<bool> {
        loop {
            let ring = self.ring.lock();
            match ring.submit() {
                Ok(_) => return Ok(true),
                Err(err) => match err.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EBUSY | libc::EAGAIN) => return Ok(false),
                    _ => return Err(err),
                },
            }
        }
    }

    /// Takes a job whose operation is complete, with the result.
    pub(in super::super) fn take(&mut self) -> Option<(Job, io::Result<usize>)> {
        if self.completed.is_empty() {
            let mut ring = self.ring.lock();
            let done = ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()));
            self.completed.extend(done);
        }
        let (index, result) = self.completed.pop_front()?;
        let job = usize::try_from(index)
            .ok()
            .and_then(|index| self.jobs.get_mut(index))?
            .take()?;
        self.free.extend(u16::try_from(index));
        let result = usize::try_from(result)
            .map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
        Some((job, result))
    }

    /// Waits for at least one completion.
    pub(in super::super) fn wait(&mut self) -> io::Result<()> {
        if !self.completed.is_empty() {
            return Ok(());
        }
        let ring = self.ring.lock();
        loop {
            match ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // Completions are there to be taken.
                Err(err) if err.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(err) => return Err(err),
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        while !self.is_empty() {
            if let Err(err) = self.wait() {
                // Cannot happen on a sound ring. The kernel may still use the jobs' memory.
                tracing::error!(%err, "cannot wait for disk requests: leaking them");
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while self.take().is_some() {}
        }
    }
}

/// The submission entry of a job's operation.
fn entry(job: &Job) -> Option<squeue::Entry> {
    let fd = Fd(job.backing()?.raw_fd());
    let flags = |durable| if durable { libc::RWF_DSYNC } else { 0 };
    Some(match job.operation()? {
        Operation::Read { into, offset } => {
            let (vectors, count) = into.raw();
            opcode::Readv::new(fd, vectors, count)
                .offset(offset)
                .build()
        }
        Operation::Write {
            from,
            offset,
            durable,
        } => {
            let (vectors, count) = from.raw();
            opcode::Writev::new(fd, vectors, count)
                .offset(offset)
                .rw_flags(flags(durable))
                .build()
        }
        Operation::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Operation::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(mode)
            .build(),
        // Block devices as well: the kernel makes it a zeroing that deallocates.
        Operation::Discard { offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
        Operation::Fill {
            data,
            offset,
            durable,
        } => {
            let len = u32::try_from(data.len()).ok()?;
            opcode::Write::new(fd, data.as_ptr(), len)
                .offset(offset)
                .rw_flags(flags(durable))
                .build()
        }
    })
}
