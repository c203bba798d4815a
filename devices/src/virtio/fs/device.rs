//! [`Fs`]: config space, activation, reset.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{Mode, OFlags};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::{FsConfig, FsError, ShareRoot};
use super::share::{Policy, Share};
use super::state::FsState;
use super::tag::Tag;
use super::window::{BLOCK_BYTES, Window};
use super::worker::{self, Served, Shared};
use crate::virtio::{
    ActivateError, Activation, DeviceType, Runner, SharedMemory, StateError, VirtioDevice,
    WorkerId, config,
};

/// FORGET and INTERRUPT; Linux sends them singly.
const HIPRIO_SIZE: u16 = 128;
/// Requests with the most pages need as many descriptors as that.
const REQUEST_SIZE: u16 = 1024;
const MAX_QUEUES: u16 = 16;
const MAX_WORKERS: u16 = 64;

/// A virtio file system device, serving one directory tree.
pub struct Fs {
    name: String,
    tag: Tag,
    handle: FsHandle,
    policy: Policy,
    request_queues: u16,
    workers: u16,
    queue_sizes: Vec<u16>,
    /// The session of the driver that has started the device, here or before a snapshot.
    session: Option<Arc<Served>>,
    window: Option<Arc<Window>>,
    active: Option<(Arc<dyn Runner>, Vec<WorkerId>)>,
}

/// Moves a device's share; clones are handles of the same device.
#[derive(Clone, Debug)]
pub struct FsHandle(Arc<Mutex<Root>>);

/// What is shared, and the session that serves it now.
#[derive(Debug)]
struct Root {
    root: OwnedFd,
    served: Weak<Share>,
}

impl FsHandle {
    fn new(root: OwnedFd) -> Self {
        let served = Weak::new();
        Self(Arc::new(Mutex::new(Root { root, served })))
    }

    /// Shares another tree from now on: for a guest that was started before it was known
    /// what it is to see.
    ///
    /// # Errors
    /// [`FsError::Root`] when the tree cannot be opened, or the guest uses the share already.
    pub fn move_to(&self, root: &ShareRoot) -> Result<(), FsError> {
        let opened = open_root(root)?;
        let mut shared = self.lock();
        let moved = match shared.served.upgrade() {
            Some(share) => opened.try_clone().and_then(|root| share.move_to(root)),
            None => Ok(()),
        };
        moved.map_err(|source| FsError::Root {
            root: root.to_string(),
            source,
        })?;
        shared.root = opened;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Root> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fs {
    /// Makes the device; the shared directory is opened now and served from activation on.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        let tag = Tag::new(&config.tag)?;
        check_range("request_queues", config.request_queues, MAX_QUEUES)?;
        check_range("workers", config.workers, MAX_WORKERS)?;
        let root = open_root(&config.root)?;
        let window = open_window(config.dax_bytes)?;
        let policy = Policy::from(&config);
        let mut queue_sizes = vec![HIPRIO_SIZE];
        queue_sizes.extend((0..config.request_queues).map(|_| REQUEST_SIZE));
        Ok(Self {
            name: config.tag,
            tag,
            handle: FsHandle::new(root),
            policy,
            request_queues: config.request_queues,
            workers: config.workers,
            queue_sizes,
            session: None,
            window,
            active: None,
        })
    }

    /// For what can change while the device is in use.
    #[must_use]
    pub fn handle(&self) -> FsHandle {
        self.handle.clone()
    }

    /// A share that the guest knows nothing of.
    fn serve(&self) -> io::Result<Arc<Served>> {
        let mut shared = self.handle.lock();
        let root = shared.root.try_clone()?;
        let served = Served::new(Share::new(root, self.policy, self.window.clone())?);
        shared.served = Arc::downgrade(&served.share);
        Ok(Arc::new(served))
    }

    /// Finishes the requests in progress.
    fn stop(&mut self) {
        if let Some((runner, workers)) = self.active.take() {
            for worker in workers {
                runner.join(worker);
            }
        }
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let served = match &self.session {
            Some(served) => Arc::clone(served),
            None => self.serve()?,
        };
        self.session = Some(Arc::clone(&served));
        let shared = Arc::new(Shared {
            memory: activation.memory,
            interrupt: activation.interrupt,
            queues: activation.queues.into_iter().map(Mutex::new).collect(),
            served,
        });
        let runner = activation.runner;
        let (_, workers) = self
            .active
            .insert((Arc::clone(&runner), Vec::with_capacity(self.workers.into())));
        for number in 0..self.workers {
            let shared = Arc::clone(&shared);
            let worker = runner.spawn(
                &format!("fs{number}-{}", self.name),
                Box::new(move |stop| worker::run(&shared, &stop)),
            )?;
            workers.push(worker);
        }
        Ok(())
    }
}

fn open_window(bytes: u64) -> Result<Option<Arc<Window>>, FsError> {
    if !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(FsError::Dax { bytes });
    }
    if bytes == 0 {
        return Ok(None);
    }
    let window = Window::new(bytes).map_err(|source| FsError::NoDax { bytes, source })?;
    Ok(Some(Arc::new(window)))
}

fn check_range(field: &'static str, value: u16, max: u16) -> Result<(), FsError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(FsError::OutOfRange {
        field,
        value: value.into(),
        max: max.into(),
    })
}

/// Opens the root again, so that it is a directory and an `O_PATH` fd for certain.
fn open_root(root: &ShareRoot) -> Result<OwnedFd, FsError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = match root {
        ShareRoot::Path(path) => rustix::fs::open(path, flags, Mode::empty()),
        ShareRoot::Fd(fd) => rustix::fs::openat(fd, ".", flags, Mode::empty()),
    };
    opened.map_err(|source| FsError::Root {
        root: root.to_string(),
        source: source.into(),
    })
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs")
            .field("tag", &self.name)
            .field("policy", &self.policy)
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.tag.config(self.request_queues), offset, data);
    }

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        let window = self.window.as_ref()?;
        Some(Arc::clone(window.memory()))
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let got = activation.queues.len();
        // The driver may leave out request queues, but not all of them.
        if got < 2 {
            return Err(ActivateError::MissingQueues { got, needed: 2 });
        }
        self.start(activation).map_err(|source| {
            self.reset();
            ActivateError::Io {
                what: "cannot start the file system workers",
                source,
            }
        })
    }

    fn reset(&mut self) {
        self.stop();
        self.session = None;
        if let Some(window) = &self.window {
            window.clear();
        }
    }

    /// The session stays: the driver does not mount again.
    fn quiesce(&mut self) {
        self.stop();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let session = self.session.as_ref().map(|served| served.share.save());
        let session = session.transpose().map_err(|source| StateError::Io {
            what: "cannot find the files of the share",
            source,
        })?;
        FsState::new(&self.name, &self.policy, session).encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state = FsState::decode(state, &self.name, &self.policy)?;
        let Some(session) = state.session else {
            return Ok(());
        };
        let served = self.serve().and_then(|served| {
            served.share.restore(&session)?;
            Ok(served)
        });
        self.session = Some(served.map_err(|source| StateError::Io {
            what: "cannot open the files of the share",
            source,
        })?);
        Ok(())
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
