//! PVH, the boot protocol of kernels that are entered in 32-bit mode and find everything from
//! one structure (Xen, "x86/HVM direct boot ABI").

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::{Initramfs, MemoryRange};
use super::layout;

const MAGIC: u32 = 0x336e_c578;
/// The first with a memory map.
const VERSION: u32 = 1;
/// Behind the start info.
const MODULES: u64 = layout::START_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;

/// Writes the start info and what it points to.
pub(super) fn write(
    memory: &GuestMemoryMmap<()>,
    initramfs: Option<Initramfs>,
    rsdp: Option<u64>,
    map: &[MemoryRange],
) -> Result<(), GuestMemoryError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        let module = hvm_modlist_entry {
            paddr: initramfs.address.into(),
            size: initramfs.bytes.into(),
            ..Default::default()
        };
        memory.write_obj(module, GuestAddress(MODULES))?;
        info.modlist_paddr = MODULES;
        info.nr_modules = 1;
    }
    let places = (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>());
    for (range, place) in map.iter().zip(places) {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes(),
            // Numbered as in e820.
            type_: range.kind,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(place))?;
        info.memmap_entries = info.memmap_entries.saturating_add(1);
    }
    memory.write_obj(info, GuestAddress(layout::START_INFO))
}
