//! ACPI tables: a hardware-reduced platform whose devices the DSDT lists.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, PackageBuilder, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::legacy::{AcpiPower, SerialPort};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{MmioDevice, Platform, layout};

const OEM: [u8; 6] = *b"KUASAR";
const TABLE: [u8; 8] = *b"EMBED   ";
const REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;

/// Writes all tables; returns the address of the RSDP. `None` when they do not fit.
pub(super) fn write(memory: &GuestMemoryMmap<()>, platform: &Platform) -> Option<u64> {
    let rsdp_at = layout::ACPI_TABLES;
    let mut writer = Writer {
        memory,
        next: rsdp_at.checked_add(u64::try_from(Rsdp::len()).ok()?.next_multiple_of(16))?,
    };
    let dsdt_at = writer.put(&dsdt(platform))?;
    let fadt_at = writer.put(&bytes_of(&fadt(dsdt_at)))?;
    let madt_at = writer.put(&bytes_of(&madt(platform)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt_at = writer.put(&bytes_of(&xsdt))?;
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt_at));
    memory.write_slice(&rsdp, GuestAddress(rsdp_at)).ok()?;
    Some(rsdp_at)
}

struct Writer<'a> {
    memory: &'a GuestMemoryMmap<()>,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &[u8]) -> Option<u64> {
        let at = self.next;
        let end = at.checked_add(u64::try_from(table.len()).ok()?)?;
        if end > layout::ACPI_TABLES_END {
            return None;
        }
        self.memory.write_slice(table, GuestAddress(at)).ok()?;
        self.next = end.next_multiple_of(16);
        Some(at)
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// No fixed hardware but the sleep and reset registers.
fn fadt(dsdt_at: u64) -> acpi_tables::fadt::FADT {
    let register = |offset: u64| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            AcpiPower::PORT.saturating_add(offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt_at)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = register(AcpiPower::RESET);
    fadt.reset_value = AcpiPower::RESET_VALUE;
    fadt.sleep_control_reg = register(AcpiPower::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(AcpiPower::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(platform: &Platform) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(layout::LAPIC),
    );
    for id in 0..platform.vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(platform.vcpus, layout::IOAPIC, 0));
    madt
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let mut body = Vec::new();
    serial_port(&mut body);
    for (index, device) in platform.devices.iter().enumerate() {
        let on_line = |other: &&MmioDevice| other.irq == device.irq;
        let shared = platform.devices.iter().filter(on_line).count() > 1;
        virtio_device(index, device, shared, &mut body);
    }
    let mut off = PackageBuilder::new();
    off.add_element(&AcpiPower::SLEEP_TYPE_OFF);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut body);

    let header_bytes = 36;
    let mut dsdt = Sdt::new(*b"DSDT", header_bytes, DSDT_REVISION, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

fn serial_port(body: &mut Vec<u8>) {
    let port = u16::try_from(SerialPort::COM1).unwrap_or(u16::MAX);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_DDN"), &"COM1"),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(port, port, 0, 8),
                        &Interrupt::new(true, true, false, false, SerialPort::COM1_IRQ),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(body);
}

/// `LNRO0005` is what Linux knows virtio-mmio devices by.
fn virtio_device(index: usize, device: &MmioDevice, shared: bool, body: &mut Vec<u8>) {
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("V{:03X}", index & 0xfff)),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &index),
                &Name::new(Path::new("_CCA"), &ONE),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, device.address, device.bytes),
                        &Interrupt::new(true, true, false, shared, device.irq),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(devices: u32) -> Platform {
        Platform {
            vcpus: 32,
            acpi: true,
            devices: (0..devices)
                .map(|n| MmioDevice {
                    address: layout::MMIO_DEVICES + n * 0x1000,
                    bytes: 0x1000,
                    irq: layout::DEVICE_IRQS[n as usize],
                })
                .collect(),
        }
    }

    fn table_at(memory: &GuestMemoryMmap<()>, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// ACPI 6.4, 5.2.5 to 5.2.8: follow the pointers, check every checksum.
    #[test]
    fn the_largest_platform_fits_and_checks_out() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let rsdp_at = write(&memory, &platform(17)).unwrap();
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, GuestAddress(rsdp_at)).unwrap();
        assert!(rsdp.starts_with(b"RSD PTR "));
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(&rsdp), 0);

        let xsdt = table_at(&memory, u64_at(&rsdp, 24));
        assert_eq!(sum(&xsdt), 0);
        let fadt = table_at(&memory, u64_at(&xsdt, 36));
        assert!(fadt.starts_with(b"FACP"));
        assert_eq!(sum(&fadt), 0);
        let madt = table_at(&memory, u64_at(&xsdt, 44));
        assert!(madt.starts_with(b"APIC"));
        assert_eq!(sum(&madt), 0);
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table_at(&memory, u64_at(&fadt, 140));
        assert!(dsdt.starts_with(b"DSDT"));
        assert_eq!(sum(&dsdt), 0);
        let found = dsdt.windows(8).filter(|bytes| bytes == b"LNRO0005");
        assert_eq!(found.count(), 17);
    }

    #[test]
    fn no_room_is_no_table() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert_eq!(write(&memory, &platform(1)), None);
    }
}
