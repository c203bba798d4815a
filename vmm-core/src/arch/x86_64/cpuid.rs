//! What CPU the guest sees.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use crate::host::Host;

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const EXTENDED_FEATURES: u32 = 0x7;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_CORES: u32 = 0x8000_0008;

/// Bits of leaf 1, ECX.
const CMPXCHG16B: u32 = 1 << 13;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Bit of leaf 1, EDX.
const HYPER_THREADING: u32 = 1 << 28;
/// Bits of leaf 7, EBX.
const SMEP: u32 = 1 << 7;
const SMAP: u32 = 1 << 20;

/// CPUID of vCPU `index` out of `vcpus`: what KVM supports, with the topology of one
/// socket of single-threaded cores. KVM's own leaves (signature, clock) come with it.
pub(crate) fn guest_cpuid(host: &Host, index: u8, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = host.kvm().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline_timer = host
        .kvm()
        .check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        shape(entry, index, vcpus, deadline_timer);
        if host.emulated_ring0() {
            hide_from_emulated_ring0(entry);
        }
    }
    Ok(cpuid)
}

fn shape(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8, deadline_timer: bool) {
    let id = u32::from(index);
    let cores = u32::from(vcpus);
    match entry.function {
        FEATURES => {
            entry.ecx |= HYPERVISOR | X2APIC;
            if deadline_timer {
                entry.ecx |= TSC_DEADLINE;
            }
            // Bits 31-24 initial APIC id, 23-16 logical processors.
            entry.ebx = entry.ebx & 0xffff | id << 24 | cores << 16;
            if vcpus > 1 {
                entry.edx |= HYPER_THREADING;
            } else {
                entry.edx &= !HYPER_THREADING;
            }
        }
        // Bits 31-26 cores less one; 25-14 threads that share the cache less one. The
        // last level is shared by all.
        CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                cores.saturating_sub(1)
            } else {
                0
            };
            let cores_field = cores.saturating_sub(1).min(0x3f);
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores_field << 26;
        }
        AMD_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                cores.saturating_sub(1)
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        TOPOLOGY | TOPOLOGY_V2 => shape_topology(entry, id, cores),
        // Cores less one, and the width of the core id.
        AMD_CORES => {
            entry.ecx = entry.ecx & !0xf0ff | cores.saturating_sub(1) | core_bits(cores) << 12;
        }
        AMD_TOPOLOGY => {
            entry.eax = id;
            // One thread in each core; the core's number.
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// One thread for each core, all cores in one package.
fn shape_topology(entry: &mut kvm_cpuid_entry2, id: u32, cores: u32) {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let (shift, count, kind) = match entry.index {
        0 => (0, 1, THREAD),
        1 => (core_bits(cores), cores, CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index & 0xff | kind << 8;
    entry.edx = id;
}

/// Bits needed to number `cores` cores.
fn core_bits(cores: u32) -> u32 {
    cores.next_power_of_two().trailing_zeros()
}

/// KVM's emulator has neither CMPXCHG16B nor the instructions of SMAP. (POPCNT and XSAVE
/// cannot be hidden there; kernel parameters do it.)
fn hide_from_emulated_ring0(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        FEATURES => entry.ecx &= !CMPXCHG16B,
        EXTENDED_FEATURES if entry.index == 0 => entry.ebx &= !(SMEP | SMAP),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_counts_one_socket_of_cores() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (8, 3), (32, 5)] {
            let mut entry = kvm_cpuid_entry2 {
                function: TOPOLOGY,
                index: 1,
                ..Default::default()
            };
            shape(&mut entry, vcpus - 1, vcpus, false);
            assert_eq!(entry.eax, bits);
            assert_eq!(entry.ebx, u32::from(vcpus));
            assert_eq!(entry.ecx, 0x201);
            assert_eq!(entry.edx, u32::from(vcpus) - 1);
        }
    }

    #[test]
    fn the_guest_knows_that_it_is_one() {
        let mut entry = kvm_cpuid_entry2 {
            function: FEATURES,
            ebx: 0xff_ff_08_00,
            edx: HYPER_THREADING,
            ..Default::default()
        };
        shape(&mut entry, 2, 4, true);
        assert_eq!(entry.ebx, 0x02_04_08_00);
        assert_eq!(entry.ecx, HYPERVISOR | X2APIC | TSC_DEADLINE);
        assert_eq!(entry.edx, HYPER_THREADING);
        shape(&mut entry, 0, 1, true);
        assert_eq!(entry.edx, 0);
    }

    #[test]
    fn what_the_emulator_lacks_is_hidden() {
        let mut entry = kvm_cpuid_entry2 {
            function: EXTENDED_FEATURES,
            ebx: u32::MAX,
            ..Default::default()
        };
        hide_from_emulated_ring0(&mut entry);
        assert_eq!(entry.ebx, !(SMEP | SMAP));
    }
}
