//! What a machine is made of, and whether that can be.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::arch;
use crate::device_set::DeviceSet;
use crate::host::Host;
use crate::memory::{HOTPLUG_ALIGN_BYTES, HUGE_PAGE_BYTES};

/// Fewest bytes of memory a Linux guest boots with.
pub const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// Most vCPUs of one machine.
pub const MAX_VCPUS: u32 = 32;
/// Most disk slots of one machine.
pub const MAX_DISK_SLOTS: usize = 16;
/// Most bytes of console output kept in a machine's log file unless configured.
pub const DEFAULT_CONSOLE_CAP_BYTES: u64 = 1 << 20;

/// How the guest learns which devices there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discovery {
    /// ACPI where the host runs the guest's kernel natively, the command line where ACPI
    /// would cost seconds.
    #[default]
    Auto,
    /// ACPI tables; needs nothing of the kernel but ACPI.
    Acpi,
    /// `virtio_mmio.device=` parameters and an MP table.
    CommandLine,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootProtocol {
    /// At its 64-bit Linux entry point. An ELF file whose own entry point is none of the
    /// addresses that it is loaded at has no such; it is entered by PVH.
    #[default]
    Auto,
    /// By PVH, which the ELF file has to have an entry point for.
    Pvh,
}

/// Where the serial console goes besides the tail kept in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleLog {
    /// The file, created with mode 0600; `None` keeps no file.
    pub path: Option<PathBuf>,
    /// Most bytes on disk. Past half of it the newest half is kept in rotation.
    pub cap_bytes: u64,
    /// Also copy the console to this process's standard output.
    pub echo: bool,
}

impl Default for ConsoleLog {
    fn default() -> Self {
        Self {
            path: None,
            cap_bytes: DEFAULT_CONSOLE_CAP_BYTES,
            echo: false,
        }
    }
}

/// Everything a [`crate::Machine`] is built from.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use vmm_core::{DeviceSet, Host, Machine, MachineConfig};
///
/// let host = Host::probe()?;
/// let mut config = MachineConfig::new("pod-1", "/boot/vmlinux");
/// config.vcpus = 2;
/// config.initramfs = Some("/boot/initramfs.cpio".into());
/// config.devices = DeviceSet::new().with_rng()?;
/// let machine = Machine::build(&host, config)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct MachineConfig {
    /// Names the machine in threads, memory and logs: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest memory in bytes: a multiple of 4096, at least [`MIN_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// Guest memory in the host's huge pages of 2 MiB, of which it is a multiple then, all
    /// taken when the machine is built.
    pub huge_pages: bool,
    /// Kernel image: a 64-bit ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// How it is entered.
    pub protocol: BootProtocol,
    /// Initial RAM file system, handed to the kernel as it is.
    pub initramfs: Option<PathBuf>,
    /// Appended to the parameters the machine needs itself (console, reboot, devices,
    /// [`Host::kernel_parameters`]); the kernel lets the later of two win.
    pub cmdline: String,
    /// Serial console output.
    pub console: ConsoleLog,
    /// Virtio devices.
    pub devices: DeviceSet,
    /// How the guest finds them.
    pub discovery: Discovery,
}

impl MachineConfig {
    /// One vCPU, 128 MiB, no devices.
    #[must_use]
    pub fn new(name: impl Into<String>, kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            vcpus: 1,
            memory_bytes: 128 << 20,
            huge_pages: false,
            kernel: kernel.into(),
            protocol: BootProtocol::Auto,
            initramfs: None,
            cmdline: String::new(),
            console: ConsoleLog::default(),
            devices: DeviceSet::new(),
            discovery: Discovery::Auto,
        }
    }

    /// Checks every field against the host and the files.
    ///
    /// # Errors
    /// The first field that cannot be, with its value and what to do.
    pub fn validate(&self, host: &Host) -> Result<(), ConfigError> {
        validate_name(&self.name)?;
        let most_vcpus = MAX_VCPUS.min(host.facts().max_vcpus);
        if self.vcpus == 0 || self.vcpus > most_vcpus {
            return Err(ConfigError::Vcpus {
                value: self.vcpus,
                most: most_vcpus,
            });
        }
        let page_bytes = if self.huge_pages {
            HUGE_PAGE_BYTES
        } else {
            4096
        };
        if self.memory_bytes < MIN_MEMORY_BYTES || !self.memory_bytes.is_multiple_of(page_bytes) {
            return Err(ConfigError::Memory {
                value: self.memory_bytes,
                page_bytes,
            });
        }
        let host_bytes = host.facts().memory_bytes;
        if self.memory_bytes > host_bytes {
            return Err(ConfigError::MemoryAboveHost {
                value: self.memory_bytes,
                host: host_bytes,
            });
        }
        check_kernel(&self.kernel)?;
        if let Some(initramfs) = &self.initramfs {
            self.validate_initramfs(initramfs)?;
        }
        validate_devices(&self.devices)?;
        if let Some(bad) = self.cmdline.chars().find(|c| c.is_control()) {
            return Err(ConfigError::CmdlineCharacter { value: bad });
        }
        Ok(())
    }

    fn validate_initramfs(&self, path: &Path) -> Result<(), ConfigError> {
        let file = open(path, "initramfs")?;
        let len = file
            .metadata()
            .map_err(|source| ConfigError::Open {
                field: "initramfs",
                path: path.to_owned(),
                source,
            })?
            .len();
        if len == 0 {
            return Err(ConfigError::InitramfsEmpty {
                path: path.to_owned(),
            });
        }
        // The kernel needs about as much again to unpack it, besides itself.
        if len > self.memory_bytes / 2 {
            return Err(ConfigError::InitramfsTooLarge {
                path: path.to_owned(),
                value: len,
                memory: self.memory_bytes,
            });
        }
        Ok(())
    }
}

pub(crate) fn validate_name(name: &str) -> Result<(), ConfigError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 64 || !name.chars().all(valid) {
        return Err(ConfigError::Name {
            value: name.to_owned(),
        });
    }
    Ok(())
}

pub(crate) fn validate_devices(devices: &DeviceSet) -> Result<(), ConfigError> {
    let most = arch::layout::DEVICE_IRQS.len();
    if devices.len() > most {
        return Err(ConfigError::TooManyDevices {
            value: devices.len(),
            most,
        });
    }
    let hotplug = devices.hotplug_bytes();
    if !hotplug.is_multiple_of(HOTPLUG_ALIGN_BYTES) {
        return Err(ConfigError::HotplugMemory { value: hotplug });
    }
    let slots = devices.disk_slots();
    if slots > MAX_DISK_SLOTS || slots > 0 && devices.len() == most {
        return Err(ConfigError::TooManyDiskSlots {
            value: slots,
            devices: devices.len(),
        });
    }
    Ok(())
}

fn open(path: &Path, field: &'static str) -> Result<File, ConfigError> {
    let error = |source| ConfigError::Open {
        field,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_dir() {
        return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    Ok(file)
}

/// Size of the header fields looked at: enough for ELF and for a bzImage's `HdrS`.
const KERNEL_HEADER_BYTES: usize = 0x206;

fn check_kernel(path: &Path) -> Result<KernelFormat, ConfigError> {
    let file = open(path, "kernel")?;
    let mut header = Vec::with_capacity(KERNEL_HEADER_BYTES);
    file.take(KERNEL_HEADER_BYTES as u64)
        .read_to_end(&mut header)
        .map_err(|source| ConfigError::Open {
            field: "kernel",
            path: path.to_owned(),
            source,
        })?;
    KernelFormat::detect(&header).map_err(|problem| ConfigError::Kernel {
        path: path.to_owned(),
        problem,
    })
}

/// Kernel images that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelFormat {
    Elf,
    BzImage,
}

impl KernelFormat {
    /// Tells the format from the first bytes of the file.
    fn detect(header: &[u8]) -> Result<Self, &'static str> {
        const EM_X86_64: [u8; 2] = 62_u16.to_le_bytes();
        if header.starts_with(b"\x7fELF") {
            if header.len() < 64 {
                return Err("the file ends within the ELF header");
            }
            if header.get(4) != Some(&2) {
                return Err("it is a 32-bit ELF file, not a 64-bit one");
            }
            if header.get(18..20) != Some(&EM_X86_64) {
                return Err("it is built for another architecture, not for x86-64");
            }
            return Ok(Self::Elf);
        }
        if header.get(0x202..0x206) == Some(b"HdrS") {
            return Ok(Self::BzImage);
        }
        if header.is_empty() {
            return Err("the file is empty");
        }
        Err("it is neither an ELF file nor a bzImage")
    }

    pub(crate) fn of(path: &Path) -> Result<Self, ConfigError> {
        check_kernel(path)
    }
}

/// A field of [`MachineConfig`] that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Name with characters that cannot be in one.
    #[error("name {value:?}: use 1 to 64 letters, digits, '.', '_' or '-'")]
    Name {
        /// As configured.
        value: String,
    },
    /// vCPU count out of range.
    #[error("vcpus = {value}: use 1 to {most} on this host")]
    Vcpus {
        /// As configured.
        value: u32,
        /// Largest possible.
        most: u32,
    },
    /// Memory too small or not in whole pages.
    #[error(
        "memory_bytes = {value}: use a multiple of {page_bytes}, at least {MIN_MEMORY_BYTES} (64 MiB)"
    )]
    Memory {
        /// As configured.
        value: u64,
        /// Size of its pages.
        page_bytes: u64,
    },
    /// Memory to be plugged in that Linux cannot use.
    #[error("devices: {value} bytes of memory to be plugged in: use a multiple of 128 MiB")]
    HotplugMemory {
        /// As configured.
        value: u64,
    },
    /// More memory than the host has.
    #[error("memory_bytes = {value}: the host has {host} bytes, use less")]
    MemoryAboveHost {
        /// As configured.
        value: u64,
        /// Of the host.
        host: u64,
    },
    /// A file cannot be opened.
    #[error("{field} = {}: cannot open it ({source}); check the path and its permissions", path.display())]
    Open {
        /// Which field names it.
        field: &'static str,
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a kernel we can boot.
    #[error("kernel = {}: {problem}; use a 64-bit x86 vmlinux or bzImage", path.display())]
    Kernel {
        /// As configured.
        path: PathBuf,
        /// What is wrong with the file.
        problem: &'static str,
    },
    /// Initramfs without content.
    #[error("initramfs = {}: the file is empty; rebuild it or leave the field out", path.display())]
    InitramfsEmpty {
        /// As configured.
        path: PathBuf,
    },
    /// Initramfs that cannot fit.
    #[error(
        "initramfs = {}: its {value} bytes do not fit a machine with memory_bytes = {memory}; \
         give at least twice its size",
        path.display()
    )]
    InitramfsTooLarge {
        /// As configured.
        path: PathBuf,
        /// Size of the file.
        value: u64,
        /// Memory of the machine.
        memory: u64,
    },
    /// More devices than interrupt lines.
    #[error("devices: {value} are configured, a machine has interrupt lines for {most}")]
    TooManyDevices {
        /// As configured.
        value: usize,
        /// Largest possible.
        most: usize,
    },
    /// More disk slots than there is room for.
    #[error(
        "devices: {value} disk slots beside {devices} other devices; use at most \
         {MAX_DISK_SLOTS}, and fewer than 17 other devices"
    )]
    TooManyDiskSlots {
        /// As configured.
        value: usize,
        /// The other devices.
        devices: usize,
    },
    /// Control characters cannot be passed on a command line.
    #[error("cmdline contains the control character {value:?}; remove it")]
    CmdlineCharacter {
        /// The character.
        value: char,
    },
    /// Command line longer than the kernel reads.
    #[error("cmdline: {value} bytes with the machine's own parameters, the kernel reads {most}")]
    CmdlineTooLong {
        /// Complete length.
        value: usize,
        /// What the kernel reads.
        most: usize,
    },
}
