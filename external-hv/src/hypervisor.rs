//! What an adapter to a hypervisor provides.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use devices::virtio::fs::CachePolicy;
use vmm_core::vm::{Disk, VmError, VmSize};

use crate::capability::Backend;
use crate::supervisor::Listen;

/// The VM of a pod, for any hypervisor.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Id of the pod, for logs and process names.
    pub name: String,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// Memory at boot in bytes.
    pub memory_bytes: u64,
    /// Kernel to boot.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: Option<PathBuf>,
    /// Appended to the kernel's command line.
    pub cmdline: String,
    /// Folder of the VM's sockets, logs and state, of mode 0700.
    pub dir: PathBuf,
    /// Folder exported to the guest.
    pub share: PathBuf,
    /// What the guest mounts it by.
    pub share_tag: String,
    /// Threads that serve it.
    pub share_workers: u16,
    /// What of it the guest may keep.
    pub share_cache: CachePolicy,
    /// Console output kept, in bytes.
    pub console_cap_bytes: u64,
    /// Network cards that the VM can have.
    pub net_slots: u32,
    /// Disks that it can have.
    pub disk_slots: u32,
    /// Whether free memory of the guest goes back to the host.
    pub balloon: bool,
    /// Host port that the guest's agent dials.
    pub control_port: u32,
    /// What its vCPUs and memory can grow to; at least those at boot.
    pub most: VmSize,
    /// Longest wait for one answer of the VMM, or for its first.
    pub api_limit: Duration,
    /// Whether VMM and guest go on when the daemon ends.
    pub outlives_daemon: bool,
}

/// Where things are in a VM's folder.
#[derive(Clone, Debug)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Of the folder `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Socket of the VMM's API.
    #[must_use]
    pub fn api(&self) -> PathBuf {
        self.dir.join("vmm.sock")
    }

    /// Socket of the share's device.
    #[must_use]
    pub fn fs(&self) -> PathBuf {
        self.dir.join("fs.sock")
    }

    /// Socket of the vsock device towards the VMM.
    #[must_use]
    pub fn vsock_device(&self) -> PathBuf {
        self.dir.join("vsock-dev.sock")
    }

    /// Socket of the guest's ports; [`crate::vsock`].
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// The console's log.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }
}

/// A network card's backing: the queues of one tap.
#[derive(Debug)]
pub struct Nic {
    /// Position among the cards.
    pub slot: usize,
    /// One fd per queue.
    pub queues: Vec<OwnedFd>,
}

/// Memory is plugged in whole sections of the guest's kernel.
pub(crate) const MEMORY_STEP_BYTES: u64 = 128 << 20;

/// A card's address until the agent sets the pod's.
pub(crate) fn card_address(slot: usize) -> String {
    format!("02:6b:75:61:00:{:02x}", slot & 0xff)
}

/// How to start a VMM.
#[derive(Debug)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Fds that it inherits, and under which numbers.
    pub fds: Vec<(OwnedFd, i32)>,
    /// Sockets that it inherits listening.
    pub listens: Vec<Listen>,
    /// Cards to plug in before the guest runs.
    pub nics: Vec<Nic>,
    /// What the guest's vsock is.
    pub vsock: GuestVsock,
}

/// What a guest's vsock is. All have the same Unix sockets; [`crate::vsock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestVsock {
    /// Our device, over vhost-user.
    Ours,
    /// One of the VMM's that has such sockets itself.
    Vmms,
    /// The host kernel's, where the guest has this address. The supervisor makes its ports
    /// into such sockets.
    Kernels(u32),
}

/// A VMM to connect to.
#[derive(Debug)]
pub struct Started {
    /// Its process.
    pub pid: u32,
    /// The guest runs, since an earlier daemon.
    pub running: bool,
    /// Cards to plug in before the guest runs, of VMMs that take no fds as arguments.
    pub nics: Vec<Nic>,
}

/// How the guest ended, as its VMM says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It reset itself or powered off.
    Reset,
    /// Its kernel panicked.
    Panicked,
    /// Its CPU shut down.
    TripleFault,
}

/// Starts VMMs of one kind.
#[async_trait]
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// What its VMs can do.
    fn backend(&self) -> Backend;

    /// Name for errors and `kuasar-ctl`.
    fn name(&self) -> &'static str;

    /// The command line for a VM with these cards.
    ///
    /// # Errors
    /// The VM cannot be on this hypervisor.
    fn launch(&self, spec: &MachineSpec, nics: Vec<Nic>) -> Result<Launch, VmError>;

    /// Connects to a VMM that was started, or that runs since an earlier daemon, and lets a
    /// guest that has not run yet run.
    async fn connect(
        &self,
        spec: &MachineSpec,
        started: Started,
    ) -> Result<Box<dyn Control>, VmError>;
}

/// A running VMM.
#[async_trait]
pub trait Control: Send + Sync + fmt::Debug {
    /// Threads that run guest code.
    fn vcpu_threads(&self) -> Vec<i32> {
        Vec::new()
    }

    /// What the VMM has said of its guest's end.
    fn guest_end(&self) -> Option<GuestEnd> {
        None
    }

    /// Stops the vCPUs.
    async fn pause(&self) -> Result<(), VmError>;

    /// Lets them run again.
    async fn resume(&self) -> Result<(), VmError>;

    /// Plugs in a network card.
    async fn attach_nic(&self, nic: Nic) -> Result<(), VmError>;

    /// Unplugs the card of a slot.
    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError>;

    /// Plugs in a disk.
    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<(), VmError>;

    /// Unplugs the disk of a slot.
    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError>;

    /// Plugs in vCPUs and memory up to this size.
    async fn resize(&self, size: VmSize) -> Result<(), VmError>;

    /// What the VM has now.
    async fn size(&self) -> Result<VmSize, VmError>;
}

/// Why a hypervisor does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HvError {
    /// The program cannot be run.
    #[error("{key} = {}: {why}", path.display())]
    Program {
        /// The configuration key that names it.
        key: String,
        /// As configured.
        path: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
    /// The VMM ended before it ran the guest.
    #[error("{vmm} ended before the guest ran: {how}")]
    EarlyExit {
        /// Its name.
        vmm: &'static str,
        /// Exit status and what it wrote to stderr.
        how: String,
    },
    /// The supervisor could not start.
    #[error("cannot start the VM's supervisor: {0}")]
    Supervisor(String),
    /// A device of the host cannot be used.
    #[error("{vmm} needs {}: {source}; {fix}", path.display())]
    HostDevice {
        /// Who needs it.
        vmm: &'static str,
        /// Which.
        path: PathBuf,
        /// What to do.
        fix: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The API socket does not answer.
    #[error("{vmm} did not {what} within {limit:?}")]
    Silent {
        /// Its name.
        vmm: &'static str,
        /// What it should have done.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The VMM refused a request.
    #[error("{vmm} refuses {request}: {why}")]
    Refused {
        /// Its name.
        vmm: &'static str,
        /// The request.
        request: String,
        /// Its answer.
        why: String,
    },
    /// The VMM says what it must not.
    #[error("{vmm} breaks its protocol: {why}")]
    Protocol {
        /// Its name.
        vmm: &'static str,
        /// How.
        why: String,
    },
}

impl From<HvError> for VmError {
    fn from(error: HvError) -> Self {
        Self::Backend(Box::new(error))
    }
}

/// Says so when a disk is refused because another VMM holds its lock: what VMMs say of that
/// names the file late or not at all.
pub(crate) fn in_use(disk: &Disk, error: VmError) -> VmError {
    match error {
        VmError::Backend(refusal) if refusal.to_string().contains(" lock") => VmError::Io {
            what: format!("{} is in use by another VM", disk.path.display()),
            source: std::io::Error::other(refusal),
        },
        error => error,
    }
}

/// Checks that a configured program can be run, so that the error names the key.
///
/// # Errors
/// It is missing, no file, or not executable.
pub fn check_program(key: &str, path: &Path) -> Result<(), HvError> {
    use std::os::unix::fs::PermissionsExt;
    let why = match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => "it is not a file".to_owned(),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            "it is not executable; chmod +x it, or name another one".to_owned()
        }
        Ok(_) => return Ok(()),
        Err(err) => format!("{err}; install it, or set {key} to where it is"),
    };
    Err(HvError::Program {
        key: key.to_owned(),
        path: path.to_owned(),
        why,
    })
}
