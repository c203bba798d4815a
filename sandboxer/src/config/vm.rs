//! `[vm]` and `[fs]`: the virtual machine of each pod and what it shares with the host.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use devices::virtio::fs::{CachePolicy, DAX_BLOCK_BYTES};
use guest_image::{Cache, GuestError, GuestImage};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use vmm_core::config::MAX_VCPUS;
use vmm_core::memory::HOTPLUG_ALIGN_BYTES;
use vmm_core::vm::VmSize;

use super::{ConfigError, wrong_in};

/// Below this a guest cannot boot.
pub(crate) const MIN_MEMORY: ByteSize = ByteSize::mib(64);

/// Each is a device with an interrupt of its own.
const MAX_NET_SLOTS: u32 = 8;

/// They share the interrupts that the other devices leave.
const MAX_DISK_SLOTS: u32 = 16;

/// All pods together have room for 32 GiB at a time.
const MAX_DAX: ByteSize = ByteSize::gib(16);

/// Environment variable that overrides `vm.kernel`.
pub(crate) const KERNEL_VAR: &str = "KUASAR_KERNEL";

/// Environment variable that overrides `vm.initramfs`.
pub(crate) const INITRAMFS_VAR: &str = "KUASAR_INITRAMFS";

/// Entry of a pod's share that is the shell of its debug console.
pub(crate) const DEBUG_SHELL: &str = "debug-shell";

/// Where `make install` puts the guest, beside the configuration file.
const INSTALLED: &str = "/var/lib/kuasar";

/// `[vm]`: the virtual machine of each pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    /// vCPUs of a pod that has no CPU limit. A pod with one gets `ceil(quota / period)`.
    pub vcpus: u32,
    /// Memory of a pod that has no memory limit, for instance `"128MiB"`.
    pub memory: ByteSize,
    /// What a pod's memory can grow to while it runs, when the limit of a container is raised;
    /// rounded up to 128 MiB more than it starts with. Unset: it does not grow.
    pub max_memory: Option<ByteSize>,
    /// How many vCPUs a pod can have while it runs, when the limit of a container is raised.
    /// Unset: as many as it starts with.
    pub max_vcpus: Option<u32>,
    /// Whether free memory of the guest goes back to the host.
    pub balloon: bool,
    /// Guest memory in the host's huge pages of 2 MiB, all taken when the pod starts. Such
    /// pods boot, since clones of a template share small pages, and give no memory back.
    pub huge_pages: bool,
    /// CPUs of the host that run vCPUs; empty: all.
    pub cpu_affinity: Vec<usize>,
    /// Added to the memory limit of a pod that has one, for the guest's kernel and agent.
    pub memory_overhead: ByteSize,
    /// The guest kernel, an ELF `vmlinux` or a bzImage. `KUASAR_KERNEL` overrides
    /// it. Neither: the newest one built by `kuasar-ctl guest build`, else the installed one.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs with the agent as `/init`. `KUASAR_INITRAMFS` overrides
    /// it. Neither: the newest one built, else the installed one.
    pub initramfs: Option<PathBuf>,
    /// Appended to the kernel command line.
    pub kernel_params: String,
    /// A shell of the host, linked statically, for instance `/bin/busybox`: pods have a debug
    /// console then, a shell in the guest itself (`kuasar-ctl debug-console`). Unset: none.
    pub debug_console: Option<PathBuf>,
    /// How the guest learns which devices there are: `auto` (ACPI, but the command line where
    /// the host emulates guest ring 0 and ACPI costs seconds), `acpi`, `command-line`.
    pub discovery: DeviceDiscovery,
    /// How many network interfaces a pod can have: cards that each machine is built with, to
    /// be plugged in when the pod starts. 0: pods have no network.
    pub net_slots: u32,
    /// How many disks a pod can have at a time: block volumes, raw block devices and root file
    /// systems on block devices or images.
    pub disk_slots: u32,
    /// How much of the guest's console is kept, the newest part.
    pub serial_log_bytes: ByteSize,
    /// Whether the guest's ports are also reachable through `<dir>/<pod>/vsock.sock` by
    /// writing `CONNECT <port>`, for tools.
    pub vsock_uds: bool,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory: ByteSize::mib(128),
            max_memory: None,
            max_vcpus: None,
            balloon: true,
            huge_pages: false,
            cpu_affinity: Vec::new(),
            memory_overhead: ByteSize::mib(48),
            kernel: None,
            initramfs: None,
            kernel_params: String::new(),
            debug_console: None,
            discovery: DeviceDiscovery::Auto,
            net_slots: 1,
            disk_slots: 8,
            serial_log_bytes: ByteSize::kib(256),
            vsock_uds: true,
        }
    }
}

impl Vm {
    /// What a machine that starts with `vcpus` and `memory_bytes` can grow to.
    pub(crate) fn most(&self, vcpus: u32, memory_bytes: u64) -> VmSize {
        let most = self.max_memory.map_or(0, |most| most.as_u64());
        let more = most.saturating_sub(memory_bytes);
        let more = more.checked_next_multiple_of(HOTPLUG_ALIGN_BYTES);
        VmSize {
            vcpus: self.max_vcpus.map_or(vcpus, |most| most.max(vcpus)),
            memory_bytes: memory_bytes.saturating_add(more.unwrap_or(0)),
        }
    }

    /// Whether machines have a balloon.
    pub(crate) fn gives_memory_back(&self) -> bool {
        self.balloon && !self.huge_pages
    }

    /// A CPU of [`Self::cpu_affinity`] that is not there.
    fn missing_cpu(&self) -> Option<usize> {
        let usable = sched_getaffinity(Pid::from_raw(0)).ok()?;
        let is_missing = |cpu: &usize| !usable.is_set(*cpu).unwrap_or(false);
        self.cpu_affinity.iter().copied().find(is_missing)
    }

    /// Keeps these threads on the configured CPUs; they are asked for only if there are any.
    ///
    /// # Errors
    /// A CPU has gone since the daemon was started.
    pub(crate) fn pin(&self, threads: impl FnOnce() -> Vec<i32>) -> nix::Result<()> {
        if self.cpu_affinity.is_empty() {
            return Ok(());
        }
        let mut cpus = CpuSet::new();
        for cpu in &self.cpu_affinity {
            cpus.set(*cpu)?;
        }
        let mut threads = threads().into_iter();
        threads.try_for_each(|thread| sched_setaffinity(Pid::from_raw(thread), &cpus))
    }

    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = wrong_in(path);
        if self.vcpus == 0 {
            return wrong("vm.vcpus", "0".to_owned(), "must be at least 1");
        }
        if let Some(shell) = &self.debug_console
            && !shell.is_file()
        {
            let value = shell.display().to_string();
            return wrong("vm.debug_console", value, "must be a program of this host");
        }
        if self.huge_pages && self.max_memory.is_some() {
            let fix = "must be unset with vm.huge_pages, which takes all memory at the start";
            return wrong("vm.max_memory", "set".to_owned(), fix);
        }
        if let Some(cpu) = self.missing_cpu() {
            let fix = "must list CPUs that this host has online and this process may use";
            return wrong("vm.cpu_affinity", cpu.to_string(), fix);
        }
        if self.net_slots > MAX_NET_SLOTS {
            let value = self.net_slots.to_string();
            return wrong("vm.net_slots", value, "must be at most 8");
        }
        if let Some(most) = self.max_vcpus
            && !(1..=MAX_VCPUS).contains(&most)
        {
            return wrong("vm.max_vcpus", most.to_string(), "must be 1 to 32");
        }
        if self.disk_slots > MAX_DISK_SLOTS {
            let value = self.disk_slots.to_string();
            return wrong("vm.disk_slots", value, "must be at most 16");
        }
        if self.memory < MIN_MEMORY {
            let value = self.memory.display().iec().to_string();
            return wrong(
                "vm.memory",
                value,
                "must be at least 64MiB, or the guest cannot boot",
            );
        }
        Ok(())
    }

    /// Tells the agent of the debug console, if there is to be one.
    pub(super) fn announce_debug_console(&mut self) {
        if self.debug_console.is_some() {
            let shell = format!(" task.debug_shell={}/{DEBUG_SHELL}", agent_api::SHARE_DIR);
            self.kernel_params.push_str(&shell);
        }
    }

    /// The kernel and initramfs to boot, from the environment, the keys, the cache of built
    /// guest images, or where `make install` puts them.
    ///
    /// # Errors
    /// Nothing is configured and nothing was built, or a file is missing. The message says
    /// what to do.
    pub fn guest_files(&self) -> Result<GuestFiles, MissingGuestFile> {
        let kernel = chosen(KERNEL_VAR, self.kernel.as_deref());
        let initramfs = chosen(INITRAMFS_VAR, self.initramfs.as_deref());
        let (kernel, initramfs) = match (kernel, initramfs) {
            (Some(kernel), Some(initramfs)) => (kernel, initramfs),
            (kernel, initramfs) => {
                let found = built_or_installed(Path::new(INSTALLED))?;
                (
                    kernel.unwrap_or(found.kernel),
                    initramfs.unwrap_or(found.initramfs),
                )
            }
        };
        check_file("kernel", &kernel)?;
        check_file("initramfs", &initramfs)?;
        Ok(GuestFiles { kernel, initramfs })
    }
}

/// What a VM boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// ELF `vmlinux` or bzImage.
    pub kernel: PathBuf,
    /// cpio archive with the agent as `/init`.
    pub initramfs: PathBuf,
}

/// A part of the guest is not there.
#[derive(Debug, thiserror::Error)]
pub enum MissingGuestFile {
    /// Neither configured nor built.
    #[error(
        "no guest to boot: {0}; or set `vm.kernel` and `vm.initramfs` in the configuration \
         file, or KUASAR_KERNEL and KUASAR_INITRAMFS in the environment"
    )]
    NotBuilt(#[from] guest_image::GuestError),
    /// Configured, but not a file.
    #[error("the guest {what} {path} cannot be used: {reason}")]
    Unusable {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The image that was built last on this machine, else the one in `folder`.
fn built_or_installed(folder: &Path) -> Result<GuestFiles, GuestError> {
    match Cache::locate().and_then(|cache| GuestImage::current(&cache)) {
        Ok(image) => Ok(GuestFiles {
            kernel: image.kernel,
            initramfs: image.initramfs,
        }),
        Err(e @ (GuestError::NotBuilt(_) | GuestError::NoCacheDir)) => installed(folder).ok_or(e),
        Err(e) => Err(e),
    }
}

/// The guest in `folder`, if one is there.
fn installed(folder: &Path) -> Option<GuestFiles> {
    let files = GuestFiles {
        kernel: folder.join("vmlinux"),
        initramfs: folder.join("initramfs.cpio"),
    };
    (files.kernel.is_file() && files.initramfs.is_file()).then_some(files)
}

/// What the environment or the configuration names; the environment wins.
fn chosen(variable: &str, configured: Option<&Path>) -> Option<PathBuf> {
    std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| configured.map(Path::to_owned))
}

fn check_file(what: &'static str, path: &Path) -> Result<(), MissingGuestFile> {
    let reason = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => return Ok(()),
        Ok(_) => "not a regular file".to_owned(),
        Err(e) => e.to_string(),
    };
    Err(MissingGuestFile::Unusable {
        what,
        path: path.to_owned(),
        reason,
    })
}

/// How a guest learns which devices there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceDiscovery {
    /// Whichever suits the host.
    #[default]
    Auto,
    /// ACPI tables: what stock distribution kernels understand.
    Acpi,
    /// Kernel parameters and an MP table.
    CommandLine,
}

/// `[fs]`: the virtio-fs share of each pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fs {
    /// Threads per pod that serve file system requests.
    pub workers: u16,
    /// What the guest may keep: `never` (the host's changes are seen at once), `auto`
    /// (kept until the file is opened again), `always` (the host must not change files).
    pub cache: FsCache,
    /// Address space of each pod's guest for files that it then reaches without a copy of
    /// them, for instance `"256MiB"`; `"0"`: none. In-process VMs only.
    pub dax: ByteSize,
}

impl Default for Fs {
    fn default() -> Self {
        Self {
            workers: 2,
            cache: FsCache::Auto,
            dax: ByteSize::b(0),
        }
    }
}

impl Fs {
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = wrong_in(path);
        if !(1..=64).contains(&self.workers) {
            return wrong("fs.workers", self.workers.to_string(), "must be 1 to 64");
        }
        if self.dax > MAX_DAX || !self.dax.as_u64().is_multiple_of(DAX_BLOCK_BYTES) {
            let fix = "use a multiple of 2MiB, at most 16GiB; \"0\" for none";
            return wrong("fs.dax", self.dax.to_string(), fix);
        }
        Ok(())
    }
}

/// How long the guest may use file data and attributes without asking again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsCache {
    /// Not at all.
    Never,
    /// Until the file is opened again.
    #[default]
    Auto,
    /// For ever.
    Always,
}

impl From<FsCache> for CachePolicy {
    fn from(cache: FsCache) -> Self {
        match cache {
            FsCache::Never => Self::Never,
            FsCache::Auto => Self::Auto,
            FsCache::Always => Self::Always,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installed_guest_has_both_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vmlinux"), "").unwrap();
        assert_eq!(installed(dir.path()), None);
        std::fs::write(dir.path().join("initramfs.cpio"), "").unwrap();
        let files = installed(dir.path()).unwrap();
        assert!(files.kernel.ends_with("vmlinux"));
        assert!(files.initramfs.ends_with("initramfs.cpio"));
    }
}
