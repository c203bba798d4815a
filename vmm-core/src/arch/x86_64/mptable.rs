//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): processors and
//! interrupt lines for kernels that run without ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const SPEC_REVISION: u8 = 4;
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Writes the floating pointer and the table right behind it.
pub(super) fn write(memory: &GuestMemoryMmap<()>, vcpus: u8) -> Result<(), GuestMemoryError> {
    let table_at = layout::MP_TABLE.saturating_add(16);
    let mut bytes = floating_pointer(table_at);
    bytes.extend(table(vcpus));
    debug_assert!(bytes.len() as u64 <= layout::MP_TABLE_END - layout::MP_TABLE);
    memory.write_slice(&bytes, GuestAddress(layout::MP_TABLE))
}

/// MP spec, 4.1.
fn floating_pointer(table_at: u64) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(u32::try_from(table_at).unwrap_or(0).to_le_bytes());
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

/// MP spec, 4.2 and 4.3.
fn table(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        const ENABLED: u8 = 1;
        const BOOT: u8 = 2;
        let flags = if id == 0 { ENABLED | BOOT } else { ENABLED };
        let mut entry = vec![0, id, LAPIC_VERSION, flags];
        entry.extend(0x600_u32.to_le_bytes()); // Family 6: any with a local APIC will do.
        entry.extend(0x201_u32.to_le_bytes()); // FPU and APIC on chip.
        entry.extend([0; 8]);
        entries.push(entry);
    }
    entries.push(b"\x01\x00ISA   ".to_vec());
    let mut ioapic = vec![2, ioapic_id, IOAPIC_VERSION, 1];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    entries.push(ioapic);
    // All lines are ISA's: edge-triggered, active high, input n for line n.
    for line in 0..layout::IOAPIC_INPUTS {
        entries.push(vec![3, INTERRUPT, 0, 0, 0, line, ioapic_id, line]);
    }
    entries.push(vec![4, EXT_INT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, 0, 0, 0xff, 1]);

    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    let body = entries.concat();
    let len = u16::try_from(body.len().saturating_add(44)).unwrap_or(u16::MAX);
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"KUASAR  EMBED       ");
    bytes.extend([0; 6]); // No OEM table.
    bytes.extend(count.to_le_bytes());
    bytes.extend(layout::LAPIC.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    set_checksum(&mut bytes, 7);
    bytes
}

/// Sets the byte at `position` so that all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(position) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_and_lengths_hold_for_all_sizes() {
        for vcpus in 1..=32 {
            let table = table(vcpus);
            assert_eq!(sum(&table), 0);
            let len = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(len), table.len());
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 24 + 2);
            let room = layout::MP_TABLE_END - layout::MP_TABLE - 16;
            assert!(table.len() as u64 <= room, "{vcpus} vCPUs");
        }
        assert_eq!(sum(&floating_pointer(0x9fc10)), 0);
        assert_eq!(floating_pointer(0x9fc10).len(), 16);
    }
}
