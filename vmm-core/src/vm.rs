//! What a pod needs of a virtual machine, whoever runs it.
//!
//! The in-process machine of this crate implements [`Vm`], and so does every adapter to
//! an external hypervisor. What a backend cannot do is [`VmError::Unsupported`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use devices::virtio::net::TapDevice;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// A byte stream between host and guest.
pub trait GuestStream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> GuestStream for T {}

/// Streams that guests open to one host port.
#[async_trait]
pub trait GuestListener: Send + Sync {
    /// The next stream; `None` once the VM is gone. Cancel safe.
    async fn accept(&mut self) -> Option<Box<dyn GuestStream>>;
}

/// Why a VM no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Stopped by the host.
    Stopped,
    /// The guest reset or powered itself off.
    GuestReset,
    /// Triple fault or another shutdown of the CPU.
    TripleFault,
    /// The guest kernel panicked; the last lines of its console, if it wrote any.
    GuestPanic(String),
    /// KVM refused to run a vCPU (internal error, failed entry, ...).
    Kvm(String),
    /// A thread of the VM panicked: a bug of ours, confined to this VM.
    Panic {
        /// Name of the thread.
        thread: String,
        /// Panic message.
        message: String,
    },
    /// A device failed in a way the VM cannot survive.
    Device(String),
    /// The process of an external VMM ended by itself: how, and what it said.
    Process(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped by the host"),
            Self::GuestReset => f.write_str("the guest reset itself"),
            Self::TripleFault => f.write_str("triple fault in the guest"),
            Self::GuestPanic(tail) => write!(f, "guest kernel panic: {tail}"),
            Self::Kvm(what) => write!(f, "KVM cannot run the guest: {what}"),
            Self::Panic { thread, message } => write!(f, "thread {thread} panicked: {message}"),
            Self::Device(what) => write!(f, "device failure: {what}"),
            Self::Process(how) => write!(f, "the VMM ended: {how}"),
        }
    }
}

/// vCPU exits to this process by kind ("io", "mmio", ...).
pub type ExitCounts = BTreeMap<&'static str, u64>;

/// A point in the life of a VM, and what it took to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseReached {
    /// "vm built", "kernel entered", ...
    pub name: &'static str,
    /// Since building the VM began.
    pub since: Duration,
    /// vCPU exits until then, summed over vCPUs.
    pub exits: ExitCounts,
}

/// Figures of one VM.
#[derive(Clone, Debug, Default)]
pub struct VmStats {
    /// vCPU exits to this process, summed over vCPUs.
    pub exits: ExitCounts,
    /// The phases reached so far, in order.
    pub phases: Vec<PhaseReached>,
    /// Guest memory size in bytes.
    pub memory_bytes: u64,
    /// Guest memory backed by host pages now, in bytes, when known.
    pub resident_bytes: Option<u64>,
}

/// A file or block device of the host to be plugged in as a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Where it is.
    pub path: PathBuf,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// What the guest reads as serial number: at most 20 printable ASCII characters, unique
    /// in the VM.
    pub serial: String,
}

/// Where the guest finds a disk that was plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskPlace {
    /// Behind the VM's virtio-mmio device of this number, counted from 0 in the order of
    /// their addresses. Its driver finds the disk when it is bound to the device, and has to
    /// be unbound before [`Vm::detach_disk`].
    MmioDevice(u32),
    /// It comes and goes by itself and is known by [`Disk::serial`].
    Serial,
}

/// What a VM has, or can have, of what can change while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmSize {
    /// CPUs that the guest may bring online.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
}

/// Failure of an operation on a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The backend has no such operation.
    #[error("{backend} cannot {what}")]
    Unsupported {
        /// The operation, as a verb phrase.
        what: &'static str,
        /// The backend's name.
        backend: &'static str,
    },
    /// The VM has exited.
    #[error("the VM is not running: {0}")]
    Exited(ExitReason),
    /// The deadline passed.
    #[error("{what} took longer than {limit:?}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// The limit that passed.
        limit: Duration,
    },
    /// The guest refused a connection: nothing listens on the port.
    #[error("nothing listens on guest port {0}")]
    Refused(u32),
    /// The machine was built with fewer network slots.
    #[error("there is no network slot {slot}: the machine has {slots}")]
    NoNetSlot {
        /// The slot asked for, from 0.
        slot: usize,
        /// How many there are.
        slots: usize,
    },
    /// The machine was built with fewer disk slots.
    #[error("there is no disk slot {slot}: the machine has {slots}")]
    NoDiskSlot {
        /// The slot asked for, from 0.
        slot: usize,
        /// How many there are.
        slots: usize,
    },
    /// The machine cannot get that large.
    #[error("{what} = {value}: this machine can have {least} to {most}")]
    Size {
        /// `vcpus` or `memory_bytes`.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// Least possible.
        least: u64,
        /// Most possible.
        most: u64,
    },
    /// A system call or a lower layer failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Failure of one backend, with its own error below.
    #[error(transparent)]
    Backend(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// One virtual machine. Dropping it ends it: threads joined, memory freed, sockets removed.
#[async_trait]
pub trait Vm: Send + Sync + fmt::Debug {
    /// Name of the backend, for errors and `kuasar-ctl`.
    fn backend(&self) -> &'static str;

    /// Lets the vCPUs run.
    async fn start(&self) -> Result<(), VmError>;

    /// Ends the VM; idempotent. Whatever has not ended by `deadline` is an error.
    async fn stop(&self, deadline: Duration) -> Result<(), VmError>;

    /// `None` while the VM runs; the reason once it has ended.
    fn exited(&self) -> watch::Receiver<Option<ExitReason>>;

    /// Opens a stream to a port of the guest.
    async fn connect(&self, port: u32, deadline: Duration)
    -> Result<Box<dyn GuestStream>, VmError>;

    /// Accepts the streams that the guest opens to `port` of the host. One listener per
    /// port; dropping it refuses further streams.
    fn listen(&self, port: u32) -> Result<Box<dyn GuestListener>, VmError>;

    /// Host pid to report for the pod: the process that runs the vCPUs.
    fn pid(&self) -> u32;

    /// Host thread ids that run guest code.
    fn vcpu_threads(&self) -> Vec<i32>;

    /// Host processes that exist for this VM alone; none when it runs in this process.
    fn host_processes(&self) -> Vec<i32> {
        Vec::new()
    }

    /// Figures now.
    fn stats(&self) -> VmStats;

    /// How many network cards can be plugged in.
    fn net_slots(&self) -> usize {
        0
    }

    /// Plugs a tap into network slot `slot`: the guest sees the link of that card come up.
    async fn attach_nic(&self, slot: usize, tap: TapDevice) -> Result<(), VmError> {
        let _ = (slot, tap);
        Err(VmError::Unsupported {
            what: "plug in a network card",
            backend: self.backend(),
        })
    }

    /// Unplugs the tap of network slot `slot`, which is closed when this returns.
    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _ = (slot, deadline);
        Err(VmError::Unsupported {
            what: "unplug a network card",
            backend: self.backend(),
        })
    }

    /// How many disks can be plugged in.
    fn disk_slots(&self) -> usize {
        0
    }

    /// Plugs a disk into slot `slot`. It is there when this returns, for a guest that looks
    /// where the answer says.
    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<DiskPlace, VmError> {
        let _ = (slot, disk);
        Err(VmError::Unsupported {
            what: "plug in a disk",
            backend: self.backend(),
        })
    }

    /// Unplugs the disk of slot `slot`. What the guest has been told is written has reached
    /// the host's file, which is closed when this returns.
    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let _ = (slot, deadline);
        Err(VmError::Unsupported {
            what: "unplug a disk",
            backend: self.backend(),
        })
    }

    /// The size now and the largest possible; `None` where the size cannot change.
    fn resizable(&self) -> Option<(VmSize, VmSize)> {
        None
    }

    /// Changes the VM's size; returns what it has then. Memory above the size at boot comes
    /// and goes as far as the guest's kernel can give it up, at the latest by `deadline`; CPUs
    /// that the guest may use are its agent's to bring online.
    async fn resize(&self, size: VmSize, deadline: Duration) -> Result<VmSize, VmError> {
        let _ = (size, deadline);
        Err(VmError::Unsupported {
            what: "change its size",
            backend: self.backend(),
        })
    }

    /// Records that the VM reached `phase` now, for [`VmStats::phases`]; only the first
    /// time counts. Backends without figures ignore it.
    fn mark_phase(&self, phase: &'static str) {
        let _ = phase;
    }

    /// The newest console output, a few KiB, where the backend has it.
    fn console_tail(&self) -> Option<String> {
        None
    }

    /// Stops the vCPUs without losing state.
    async fn pause(&self) -> Result<(), VmError> {
        Err(VmError::Unsupported {
            what: "pause a VM",
            backend: self.backend(),
        })
    }

    /// Pauses the VM and writes all of it to `dir`, an empty folder; who restores it has to
    /// name the same `label`. What the snapshot in `base`, of the same label, has as well is
    /// left out; that folder is needed then too. It stays paused.
    async fn snapshot(&self, dir: &Path, label: &str, base: Option<&Path>) -> Result<(), VmError> {
        let _ = (dir, label, base);
        Err(VmError::Unsupported {
            what: "write a VM to disk",
            backend: self.backend(),
        })
    }

    /// Lets paused vCPUs run again.
    async fn resume(&self) -> Result<(), VmError> {
        Err(VmError::Unsupported {
            what: "resume a VM",
            backend: self.backend(),
        })
    }
}
