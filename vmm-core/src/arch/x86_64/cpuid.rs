//! What CPU the guest sees.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Cap;

use crate::host::Host;

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const EXTENDED_FEATURES: u32 = 0x7;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_FEATURES: u32 = 0x4000_0001;
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
/// Bits of KVM's leaf that announce hypercalls: kick a halted vCPU, send IPIs, yield to a
/// vCPU, tell encryption of pages, control migration.
const HYPERCALL_FEATURES: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17;

/// CPUID of vCPU `index` out of `vcpus`: what KVM supports, with the topology of one
/// socket of single-threaded cores. KVM's own leaves (signature, clock) come with it.
pub(crate) fn guest_cpuid(host: &Host, index: u8, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
    let supported = host.kvm().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline_timer = host.kvm().check_extension(Cap::TscDeadlineTimer);
    let mut entries = with_topology(supported.as_slice(), index.into(), vcpus.into());
    for entry in &mut entries {
        shape(entry, index, vcpus, deadline_timer);
        if host.emulated_ring0() {
            hide_from_emulated_ring0(entry);
        }
    }
    CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// Replaces the topology leaves that KVM reports, which are the host's or empty: one
/// thread for each core, all cores in one package, then the end of the list.
fn with_topology(supported: &[kvm_cpuid_entry2], id: u32, cores: u32) -> Vec<kvm_cpuid_entry2> {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    const NONE: u32 = 0;
    let (topology, mut entries): (Vec<_>, Vec<_>) = supported
        .iter()
        .copied()
        .partition(|entry: &kvm_cpuid_entry2| matches!(entry.function, TOPOLOGY | TOPOLOGY_V2));
    let levels = [
        (0, 1, THREAD),
        (core_bits(cores), cores, CORE),
        (0, 0, NONE),
    ];
    for leaf in topology.iter().filter(|leaf| leaf.index == 0) {
        for (index, (shift, count, kind)) in (0_u32..).zip(levels) {
            entries.push(kvm_cpuid_entry2 {
                function: leaf.function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: index | kind << 8,
                edx: id,
                ..Default::default()
            });
        }
    }
    entries
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

/// Bits needed to number `cores` cores.
fn core_bits(cores: u32) -> u32 {
    cores.next_power_of_two().trailing_zeros()
}

/// KVM's emulator has neither CMPXCHG16B nor the instructions of SMAP, and a hypercall from
/// emulated code never returns: a guest with several vCPUs would hang at its first IPI.
/// (POPCNT and XSAVE cannot be hidden there; kernel parameters do it.)
fn hide_from_emulated_ring0(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        FEATURES => entry.ecx &= !CMPXCHG16B,
        EXTENDED_FEATURES if entry.index == 0 => entry.ebx &= !(SMEP | SMAP),
        KVM_FEATURES => entry.eax &= !HYPERCALL_FEATURES,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_counts_one_socket_of_cores() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (8, 3), (32, 5)] {
            // As KVM reports it: one empty sub-leaf.
            let supported = [kvm_cpuid_entry2 {
                function: TOPOLOGY,
                ..Default::default()
            }];
            let entries = with_topology(&supported, vcpus - 1, vcpus);
            let found: Vec<_> = entries
                .iter()
                .map(|entry| (entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx))
                .collect();
            let id = vcpus - 1;
            let expected = [
                (0, 0, 1, 0x100, id),
                (1, bits, vcpus, 0x201, id),
                (2, 0, 0, 2, id),
            ];
            assert_eq!(found, expected);
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
        let mut entry = kvm_cpuid_entry2 {
            function: KVM_FEATURES,
            eax: u32::MAX,
            ..Default::default()
        };
        hide_from_emulated_ring0(&mut entry);
        let clock = 1 << 3;
        assert_eq!(entry.eax & (HYPERCALL_FEATURES | clock), clock);
    }
}
