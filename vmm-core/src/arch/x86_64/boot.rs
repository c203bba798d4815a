//! Loading a kernel and telling it about its machine (Linux x86 boot protocol).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Platform, acpi, layout, mptable, pvh, registers};
use crate::config::{BootProtocol, ConfigError, KernelFormat};
use crate::memory::{GuestRam, ram_regions};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// Where a bzImage has its 64-bit entry point.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: Option<&'a Path>,
    /// Complete command line.
    pub(crate) cmdline: &'a str,
    pub(crate) protocol: BootProtocol,
}

/// Where the first vCPU starts, and in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 64-bit mode, with the zero page in RSI.
    Linux(u64),
    /// In 32-bit mode, with the start info in EBX.
    Pvh(u64),
}

/// Where the initramfs lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initramfs {
    pub(super) address: u32,
    pub(super) bytes: u32,
}

/// An entry of the memory map.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryRange {
    pub(super) start: u64,
    pub(super) end: u64,
    /// As e820 numbers it.
    pub(super) kind: u32,
}

impl MemoryRange {
    pub(super) fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is not one.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file's parts cannot be read into guest memory.
    #[error(
        "kernel = {}: cannot be loaded ({reason}); the file is damaged or truncated, or \
         memory_bytes is too small for it",
        path.display()
    )]
    Load {
        /// The image.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// A bzImage for 32-bit entry only.
    #[error("kernel = {}: has no 64-bit entry point; use a 64-bit kernel", path.display())]
    No64BitEntry {
        /// The image.
        path: PathBuf,
    },
    /// PVH was asked for, or is the only way in, and cannot be.
    #[error(
        "kernel = {}: has no PVH entry point within what is loaded; use an ELF file with one \
         (an ELF note of owner Xen, type 18), or a kernel with a 64-bit Linux entry and \
         protocol = Auto",
        path.display()
    )]
    NoPvhEntry {
        /// The image.
        path: PathBuf,
    },
    /// Kernel and initramfs do not fit.
    #[error(
        "memory_bytes = {memory}: the kernel needs {kernel} bytes and the initramfs {initramfs}; \
         give more memory"
    )]
    TooLittleMemory {
        /// Of the machine.
        memory: u64,
        /// End of the kernel.
        kernel: u64,
        /// Size of the initramfs.
        initramfs: u64,
    },
    /// The initramfs cannot be read.
    #[error("initramfs = {}: cannot be read", path.display())]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Guest memory does not hold the boot structures.
    #[error("cannot write the boot structures to guest memory")]
    Memory(#[from] GuestMemoryError),
    /// More devices than ACPI tables have room for.
    #[error("the ACPI tables do not fit")]
    AcpiTables,
}

/// Puts everything the first vCPU needs into memory; returns where it starts.
pub(crate) fn load(
    ram: &GuestRam,
    source: &Kernel<'_>,
    platform: &Platform,
) -> Result<Entry, BootError> {
    let memory: &GuestMemoryMmap<()> = ram.guest_memory();
    let image = load_kernel(memory, source)?;
    let initramfs = match source.initramfs {
        Some(path) => Some(load_initramfs(ram, path, image.end)?),
        None if image.end > low_ram_end(ram) => {
            return Err(too_little_memory(ram, image.end, 0));
        }
        None => None,
    };
    let mut cmdline = source.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    memory.write_slice(&cmdline, GuestAddress(layout::CMDLINE))?;
    let rsdp = match platform.acpi {
        true => Some(acpi::write(memory, platform).ok_or(BootError::AcpiTables)?),
        false => None,
    };
    mptable::write(memory, platform.vcpus)?;
    let map = memory_map(ram.bytes());
    match image.entry {
        Entry::Linux(_) => {
            let params = boot_params(&image, source.cmdline, initramfs, rsdp, &map);
            memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
            registers::write_tables(memory)?;
        }
        Entry::Pvh(_) => pvh::write(memory, initramfs, rsdp, &map)?,
    }
    Ok(image.entry)
}

struct Image {
    loaded: KernelLoaderResult,
    entry: Entry,
    /// First address that the kernel does not use when it starts.
    end: u64,
}

fn load_kernel(memory: &GuestMemoryMmap<()>, source: &Kernel<'_>) -> Result<Image, BootError> {
    let path = source.kernel;
    let format = KernelFormat::of(path)?;
    let failed = |reason: String| BootError::Load {
        path: path.to_owned(),
        reason,
    };
    let mut file = File::open(path).map_err(|err| failed(err.to_string()))?;
    let high_ram = Some(GuestAddress(layout::HIGH_RAM));
    let loaded = match format {
        KernelFormat::Elf => Elf::load(memory, None, &mut file, high_ram),
        KernelFormat::BzImage => BzImage::load(memory, None, &mut file, high_ram),
    }
    .map_err(|err| failed(err.to_string()))?;
    let start = loaded.kernel_load.0;
    // An ELF file's entry point that is not loaded is a virtual address: of a kernel that
    // has to be entered otherwise.
    let wants_pvh = match source.protocol {
        BootProtocol::Auto => loaded.setup_header.is_none() && start >= loaded.kernel_end,
        BootProtocol::Pvh => true,
    };
    if wants_pvh {
        let entry = pvh_entry(&loaded).ok_or_else(|| BootError::NoPvhEntry {
            path: path.to_owned(),
        })?;
        return Ok(Image {
            entry: Entry::Pvh(entry),
            end: loaded.kernel_end,
            loaded,
        });
    }
    let Some(header) = &loaded.setup_header else {
        return Ok(Image {
            entry: Entry::Linux(start),
            end: loaded.kernel_end,
            loaded,
        });
    };
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry {
            path: path.to_owned(),
        });
    }
    Ok(Image {
        entry: Entry::Linux(start.saturating_add(BZIMAGE_ENTRY_64)),
        end: start
            .saturating_add(header.init_size.into())
            .max(loaded.kernel_end),
        loaded,
    })
}

fn pvh_entry(loaded: &KernelLoaderResult) -> Option<u64> {
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => (layout::HIGH_RAM..loaded.kernel_end)
            .contains(&entry.0)
            .then_some(entry.0),
        _ => None,
    }
}

/// The initramfs goes to the end of RAM below the hole, out of the kernel's way.
fn load_initramfs(ram: &GuestRam, path: &Path, kernel_end: u64) -> Result<Initramfs, BootError> {
    let failed = |source| BootError::Initramfs {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let no_room = || too_little_memory(ram, kernel_end, bytes);
    let start = low_ram_end(ram).checked_sub(bytes).ok_or_else(no_room)? & !0xfff;
    if start < kernel_end {
        return Err(no_room());
    }
    let (Ok(address), Ok(size), Ok(len)) = (
        u32::try_from(start),
        u32::try_from(bytes),
        usize::try_from(bytes),
    ) else {
        return Err(no_room());
    };
    ram.guest_memory()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len)
        .map_err(|err| failed(io::Error::other(err)))?;
    Ok(Initramfs {
        address,
        bytes: size,
    })
}

fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.bytes().min(layout::DEVICE_HOLE_START)
}

fn too_little_memory(ram: &GuestRam, kernel: u64, initramfs: u64) -> BootError {
    BootError::TooLittleMemory {
        memory: ram.bytes(),
        kernel,
        initramfs,
    }
}

fn boot_params(
    image: &Image,
    cmdline: &str,
    initramfs: Option<Initramfs>,
    rsdp: Option<u64>,
    map: &[MemoryRange],
) -> boot_params {
    let mut params = boot_params::default();
    if let Some(header) = image.loaded.setup_header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_OTHER;
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = initramfs.address;
        params.hdr.ramdisk_size = initramfs.bytes;
    }
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    params.acpi_rsdp_addr = rsdp.unwrap_or(0);
    let mut count = 0_u8;
    let mut table = params.e820_table;
    for (slot, range) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.bytes(),
            type_: range.kind,
        };
        count = count.saturating_add(1);
    }
    params.e820_table = table;
    params.e820_entries = count;
    params
}

/// RAM without the tables below 1 MiB.
fn memory_map(ram_bytes: u64) -> Vec<MemoryRange> {
    let range = |start, end, kind| MemoryRange { start, end, kind };
    let mut map = vec![
        range(0, layout::LOW_RAM_END, E820_RAM),
        range(layout::MP_TABLE, layout::MP_TABLE_END, E820_RESERVED),
        range(layout::ACPI_TABLES, layout::ACPI_TABLES_END, E820_RESERVED),
    ];
    map.extend(ram_regions(ram_bytes).map(|region| {
        let end = region.start.saturating_add(region.bytes);
        range(region.start.max(layout::HIGH_RAM), end, E820_RAM)
    }));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_but_the_tables() {
        for bytes in [64 << 20, 3 << 30, 8_u64 << 30] {
            let map = memory_map(bytes);
            let ram = map.iter().filter(|range| range.kind == E820_RAM);
            let ram: u64 = ram.map(|range| range.bytes()).sum();
            assert_eq!(ram, bytes - (layout::HIGH_RAM - layout::LOW_RAM_END));
            let hole = map.iter().any(|range| {
                range.start < layout::DEVICE_HOLE_END && range.end > layout::DEVICE_HOLE_START
            });
            assert!(!hole);
        }
    }
}
