//! The state in which a vCPU starts (Linux x86 boot protocol, "64-bit Boot Protocol"; Xen,
//! "x86/HVM direct boot ABI").

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::Entry;
use super::{lapic, layout};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Selectors that the boot protocol fixes: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Flat 64-bit code and flat data, present, accessed.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the descriptor table and the page tables that the first vCPU starts with: the
/// first GiB mapped to itself by 2 MiB pages.
pub(super) fn write_tables(memory: &GuestMemoryMmap<()>) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    for (address, entry) in (layout::GDT..).step_by(8).zip(GDT_ENTRIES) {
        memory.write_obj(entry, GuestAddress(address))?;
    }
    memory.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PD | PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    for (entry, page) in (layout::PD..)
        .step_by(8)
        .zip((0..1_u64 << 30).step_by(2 << 20))
    {
        memory.write_obj(page | LARGE | PRESENT_WRITABLE, GuestAddress(entry))?;
    }
    Ok(())
}

/// Gives a vCPU its CPUID and registers. The first starts at `entry`; the others wait for
/// its start-up signal, which sets theirs.
pub(crate) fn configure_vcpu(
    vcpu: &VcpuFd,
    cpuid: &CpuId,
    entry: Option<Entry>,
) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_cpuid2(cpuid)?;
    set_msrs(vcpu)?;
    if let Some(entry) = entry {
        let mut sregs = vcpu.get_sregs()?;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match entry {
            Entry::Linux(address) => {
                enter_long_mode(&mut sregs);
                regs.rip = address;
                regs.rsi = layout::ZERO_PAGE;
                regs.rsp = layout::BOOT_STACK;
                regs.rbp = layout::BOOT_STACK;
            }
            Entry::Pvh(address) => {
                enter_protected_mode(&mut sregs);
                regs.rip = address;
                regs.rbx = layout::START_INFO;
            }
        }
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&regs)?;
    }
    lapic::configure(vcpu)
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    set_flat_segments(sregs);
    sregs.cs.l = 1;
    sregs.cs.db = 0;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// 32-bit protected mode without paging.
fn enter_protected_mode(sregs: &mut kvm_sregs) {
    set_flat_segments(sregs);
    // A busy 32-bit TSS.
    sregs.tr.base = 0;
    sregs.tr.limit = 0x67;
    sregs.tr.type_ = 0xb;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
}

/// All of the first 4 GiB, 32-bit code.
fn set_flat_segments(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 3,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
}

/// What firmware would have set. A KVM that lacks one of them does without.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    for (index, data) in [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ] {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
        if vcpu.set_msrs(&msrs)? == 0 {
            tracing::debug!(msr = index, "this KVM has no such MSR");
        }
    }
    Ok(())
}
