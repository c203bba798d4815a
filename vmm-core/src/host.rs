//! What this host can do.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use crate::kvm_vm::KvmVm;
use crate::memory::GuestRam;

/// The one stable version of the KVM API.
const KVM_API_VERSION: i32 = 12;

/// Capabilities a machine cannot do without, with what they are for.
const REQUIRED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "in-kernel timer"),
    (Cap::Irqfd, "interrupts by eventfd"),
    (Cap::Ioeventfd, "notifications by eventfd"),
    (Cap::UserMemory, "guest memory"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::ExtCpuid, "CPUID shaping"),
    (Cap::ImmediateExit, "stopping a vCPU"),
    (Cap::MpState, "multiprocessor state"),
    (Cap::VcpuEvents, "vCPU event state"),
];

/// This host's KVM; cheap to clone and to pass around.
#[derive(Clone, Debug)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kvm: Kvm,
    facts: HostFacts,
}

/// What was found out about the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Most vCPUs KVM gives one VM.
    pub max_vcpus: u32,
    /// Memory slots KVM gives one VM.
    pub memory_slots: usize,
    /// Physical memory in bytes.
    pub memory_bytes: u64,
    /// Guest kernels run instruction by instruction in KVM's emulator, not on the CPU:
    /// about a thousand times slower, and a few instructions fail.
    pub emulated_ring0: bool,
    /// The `kvm_pvm` module, a KVM by page tables, is loaded.
    pub pvm_module: bool,
}

impl Host {
    /// Opens `/dev/kvm` and finds out what it can do, once: keep the value.
    ///
    /// # Errors
    /// When KVM cannot be used; [`HostError::fix`] says what to do.
    pub fn probe() -> Result<Self, HostError> {
        Self::probe_at(Path::new("/dev/kvm"))
    }

    fn probe_at(device: &Path) -> Result<Self, HostError> {
        let kvm = open(device)?;
        let version = kvm.get_api_version();
        if version < 0 {
            return Err(HostError::NotKvm);
        }
        if version != KVM_API_VERSION {
            return Err(HostError::ApiVersion { version });
        }
        for (cap, what) in REQUIRED {
            if !kvm.check_extension(cap) {
                return Err(HostError::Capability { cap, what });
            }
        }
        let facts = HostFacts {
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            memory_slots: kvm.get_nr_memslots(),
            memory_bytes: memory_bytes()?,
            emulated_ring0: emulates_ring0(&kvm)?,
            pvm_module: Path::new("/sys/module/kvm_pvm").exists(),
        };
        tracing::info!(?facts, "KVM is usable");
        Ok(Self {
            inner: Arc::new(Inner { kvm, facts }),
        })
    }

    /// What was found out.
    #[must_use]
    pub fn facts(&self) -> &HostFacts {
        &self.inner.facts
    }

    /// Whether guest kernels are emulated; see [`HostFacts::emulated_ring0`]. Deadlines
    /// that wait for a guest have to be longer then.
    #[must_use]
    pub fn emulated_ring0(&self) -> bool {
        self.inner.facts.emulated_ring0
    }

    /// Names everything about this host and this release that the state of a machine
    /// depends on: saved machines are of use where it is the same.
    ///
    /// # Errors
    /// When KVM or the kernel cannot be asked.
    pub fn fingerprint(&self) -> io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        let cpuid = crate::arch::guest_cpuid(self, 0, 1)?;
        for entry in cpuid.as_slice() {
            for value in [
                entry.function,
                entry.index,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
            ] {
                hasher.update(&value.to_le_bytes());
            }
        }
        let kernel = nix::sys::utsname::uname()?;
        Ok(format!(
            "{} on Linux {} {}, CPU {}",
            env!("VMM_CORE_BUILD"),
            kernel.release().to_string_lossy(),
            kernel.version().to_string_lossy(),
            hasher.finalize().to_hex()
        ))
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.inner.kvm
    }

    /// Kernel parameters that a Linux guest needs on this host; none where the CPU runs
    /// the guest's kernel.
    ///
    /// `soft_ring0` wakes the guest kernel's own provisions for such hosts (the kernel
    /// recipe of this project has them; others ignore it), and `tick_stride` lets its ticks
    /// be rarer, each of which costs milliseconds.
    /// The emulator lacks the XSAVE family, POPCNT, CMPXCHG16B and SMAP's instructions.
    /// Without ERMS and FSRM the kernel copies by 8-byte string moves, which the emulator
    /// does about three times faster. The KVM clock stands still while a machine is
    /// saved, the time stamp counter does not there: every timer of a clone would expire at
    /// once. The timer check, the mitigations, high-resolution ticks, write-protecting the
    /// kernel, checks of copies from and to user space, sysfs entries of slabs and of
    /// built-in modules and every line on the console only cost time there.
    #[must_use]
    pub fn kernel_parameters(&self) -> &'static [&'static str] {
        if self.emulated_ring0() {
            &[
                "soft_ring0",
                "tick_stride=20",
                "noxsave",
                "clearcpuid=popcnt,cx16,smap,smep,erms,fsrm",
                "mitigations=off",
                "no_timer_check",
                "clocksource=kvm-clock",
                "highres=off",
                "pci=off",
                "rodata=off",
                "hardened_usercopy=off",
                "noreplace-smp",
                "rootfstype=ramfs",
                "initcall_blacklist=slab_sysfs_init,param_sysfs_builtin_init",
                "quiet",
                "task.log_level=warn",
            ]
        } else {
            &[]
        }
    }

    /// Environment that processes in the guest need on this host; none where the CPU runs
    /// the guest's kernel. A machine gives it to its init; whoever starts processes there
    /// passes it on.
    ///
    /// With `noxsave` the kernel does not save AVX registers, yet CPUID still shows AVX to
    /// programs: glibc must not use it.
    #[must_use]
    pub fn guest_environment(&self) -> &'static [(&'static str, &'static str)] {
        if self.emulated_ring0() {
            &[(
                "GLIBC_TUNABLES",
                "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW",
            )]
        } else {
            &[]
        }
    }
}

fn open(device: &Path) -> Result<Kvm, HostError> {
    // Probed first for the errno: the path in the message must be the one that was tried.
    let file = fs::File::options().read(true).write(true).open(device);
    match file {
        Ok(_) => {}
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Err(HostError::Missing),
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
            return Err(HostError::Permission);
        }
        // A device node whose driver is not loaded.
        Err(err) if matches!(err.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            return Err(HostError::NoDriver);
        }
        Err(source) => {
            return Err(HostError::Io {
                what: "open /dev/kvm",
                source,
            });
        }
    }
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|_| HostError::Missing)?;
    Kvm::new_with_path(path).map_err(|err| HostError::io("open /dev/kvm", err))
}

fn memory_bytes() -> Result<u64, HostError> {
    let error = |source| HostError::Io {
        what: "read /proc/meminfo",
        source,
    };
    let info = fs::read_to_string("/proc/meminfo").map_err(error)?;
    info.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| error(io::Error::from(io::ErrorKind::InvalidData)))
}

/// Runs `popcnt ax, ax; hlt` at CPL 0 in a VM of one page: a CPU runs it and halts, KVM's
/// emulator does not know it.
fn emulates_ring0(kvm: &Kvm) -> Result<bool, HostError> {
    const CODE: [u8; 5] = [0xf3, 0x0f, 0xb8, 0xc0, 0xf4];
    const PAGE: u64 = 4096;
    let fail = |err| HostError::io("run the test VM", err);
    let memory = GuestRam::new("ring0-probe", PAGE).map_err(|source| HostError::Io {
        what: "allocate the test VM's memory",
        source,
    })?;
    memory
        .guest_memory()
        .write_slice(&CODE, GuestAddress(0))
        .map_err(|err| HostError::Probe(err.to_string()))?;
    let vm = Arc::new(KvmVm::new(kvm.create_vm().map_err(fail)?));
    vm.map_memory(memory).map_err(fail)?;
    let mut vcpu = vm.fd().create_vcpu(0).map_err(fail)?;
    let mut sregs = vcpu.get_sregs().map_err(fail)?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(fail)?;
    let regs = kvm_bindings::kvm_regs {
        rip: 0,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(fail)?;
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(false),
        Ok(VcpuExit::InternalError) => Ok(true),
        Ok(other) => Err(HostError::Probe(format!("unexpected exit {other:?}"))),
        Err(err) => Err(fail(err)),
    }
}

/// Why KVM cannot be used; [`HostError::fix`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node.
    #[error("/dev/kvm does not exist")]
    Missing,
    /// Not allowed to open it.
    #[error("/dev/kvm may not be opened: permission denied")]
    Permission,
    /// A device node with nothing behind it.
    #[error("/dev/kvm exists, but no KVM is behind it")]
    NoDriver,
    /// Something else that bears its name.
    #[error("/dev/kvm is not KVM's device")]
    NotKvm,
    /// Not the stable API.
    #[error("/dev/kvm speaks API version {version}, not {KVM_API_VERSION}")]
    ApiVersion {
        /// Reported.
        version: i32,
    },
    /// A capability is missing.
    #[error("this KVM lacks {cap:?} ({what})")]
    Capability {
        /// Which.
        cap: Cap,
        /// What it is for.
        what: &'static str,
    },
    /// The test VM behaved like no known KVM.
    #[error("the test VM ended in an unknown way ({0})")]
    Probe(String),
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl HostError {
    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Missing | Self::NoDriver => {
                "load the module (modprobe kvm_intel or kvm_amd); if that fails, enable \
                 virtualization in the firmware, or nested virtualization in the hypervisor \
                 above; in a container pass --device /dev/kvm"
            }
            Self::Permission => {
                "run as root (the group kvm may open it, too); in a container pass --device \
                 /dev/kvm"
            }
            Self::NotKvm => {
                "remove what is there and load the module (modprobe kvm_intel or kvm_amd), which \
                 makes it anew; in a container pass --device /dev/kvm"
            }
            Self::ApiVersion { .. } => "update the kernel",
            Self::Capability { .. } => "update the kernel, or load kvm_intel or kvm_amd",
            Self::Probe(_) => "report it with the kernel's version (uname -a)",
            Self::Io { .. } => "see the kernel's log (dmesg)",
        }
    }

    fn io(what: &'static str, err: kvm_ioctls::Error) -> Self {
        Self::Io {
            what,
            source: err.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_do() {
        let err = Host::probe_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(err, HostError::Missing));
        assert!(err.fix().contains("modprobe"));
    }

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        let err = Host::probe_at(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(err, HostError::NotKvm), "{err}");
    }

    #[test]
    fn facts_agree_with_each_other() {
        let host = match Host::probe() {
            Ok(host) => host,
            Err(err) => {
                println!("skipped: {err}");
                return;
            }
        };
        let facts = host.facts();
        assert!(facts.max_vcpus >= 1);
        assert!(facts.memory_slots >= 8);
        assert_eq!(facts.emulated_ring0, !host.kernel_parameters().is_empty());
        assert_eq!(facts.emulated_ring0, !host.guest_environment().is_empty());
    }
}
