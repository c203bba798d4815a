//! Guest-physical memory.
//!
//! | from | what |
//! |---|---|
//! | `0x500` | GDT |
//! | `0x7000` | boot parameters (zero page), or PVH's start info and what it points to |
//! | `0x8ff0` | boot stack, growing down |
//! | `0x9000` | page tables: PML4, PDPT, PD |
//! | `0x2_0000` | kernel command line |
//! | `0x9_fc00` | MP table, reserved |
//! | `0xe_0000` | ACPI tables, reserved |
//! | `0x10_0000` | kernel, initramfs at the end of RAM below the hole |
//! | `0xc000_0000` | hole: devices, IOAPIC, LAPIC, KVM's pages |
//! | `0x1_0000_0000` | the rest of RAM, what can be plugged in, the window onto files |

/// Global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// `struct hvm_start_info` of kernels that have no zero page.
pub(crate) const START_INFO: u64 = ZERO_PAGE;
/// Initial stack pointer.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Top-level page table; the other two follow in the next pages.
pub(crate) const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub(crate) const PDPT: u64 = 0xa000;
/// Page directory.
pub(crate) const PD: u64 = 0xb000;
/// Kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Bytes of command line that Linux reads on x86, its end included.
pub(crate) const CMDLINE_BYTES: usize = 2048;
/// End of the RAM below 1 MiB; the MP table starts here, where the EBDA would be.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
/// The MP table.
pub(crate) const MP_TABLE: u64 = LOW_RAM_END;
/// End of the room for the MP table.
pub(crate) const MP_TABLE_END: u64 = 0xa_0000;
/// ACPI tables, RSDP first; within the area where kernels search for it.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub(crate) const ACPI_TABLES_END: u64 = 0x10_0000;
/// First address for the kernel.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// No RAM from here.
pub(crate) const DEVICE_HOLE_START: u64 = 0xc000_0000;
/// RAM goes on here.
pub(crate) const DEVICE_HOLE_END: u64 = 1 << 32;
/// First virtio-mmio device; a page each.
pub(crate) const MMIO_DEVICES: u32 = 0xd000_0000;
/// I/O interrupt controller.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// Local interrupt controllers.
pub(crate) const LAPIC: u32 = 0xfee0_0000;
/// A page KVM uses on CPUs without unrestricted guests.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for the same purpose.
pub(crate) const TSS: u64 = 0xfffb_d000;

/// Interrupt lines of virtio-mmio devices, edge-triggered: those of the 24 inputs of the
/// IOAPIC which no PC device has by convention.
pub(crate) const DEVICE_IRQS: [u32; 17] = [
    5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];
/// Inputs of KVM's IOAPIC.
pub(crate) const IOAPIC_INPUTS: u8 = 24;
