//! PVH: a kernel that is entered in 32-bit mode and shows what it was given.

use std::fs;

use super::*;
use crate::config::{BootProtocol, Discovery};

/// Where the guest counts the bytes of RAM in its memory map.
const RAM_BYTES: u64 = 0x5000;

std::arch::global_asm!(
    r#"
    .pushsection .rodata.pvh_guest, "a"
    .code32
    pvh_guest:
        cmp dword ptr [ebx], 0x336ec578
        jne 9f
        mov edx, 0x3f8
        // The command line.
        mov esi, [ebx + 24]
    2:  lodsb
        test al, al
        jz 3f
        out dx, al
        jmp 2b
    3:  mov al, 10
        out dx, al
        // The only module.
        cmp dword ptr [ebx + 12], 1
        jne 4f
        mov esi, [ebx + 16]
        mov ecx, [esi + 8]
        mov esi, [esi]
    2:  lodsb
        out dx, al
        loop 2b
        // The signature of the RSDP.
    4:  mov esi, [ebx + 32]
        test esi, esi
        jz 5f
        mov ecx, 8
    2:  lodsb
        out dx, al
        loop 2b
        // RAM entries: 24 bytes each, address, size, type.
    5:  mov ecx, [ebx + 48]
        mov esi, [ebx + 40]
    6:  cmp dword ptr [esi + 16], 1
        jne 7f
        mov eax, [esi + 8]
        add [{RAM_BYTES}], eax
        mov eax, [esi + 12]
        adc [{RAM_BYTES} + 4], eax
    7:  add esi, 24
        loop 6b
    9:  mov edx, 0x64
        mov al, 0xfe
        out dx, al
    2:  hlt
        jmp 2b
    pvh_guest_end:
    .code64
    .popsection
    "#,
    RAM_BYTES = const RAM_BYTES,
);

unsafe extern "C" {
    static pvh_guest: u8;
    static pvh_guest_end: u8;
}

fn guest() -> Code {
    // SAFETY: both are in the section above, which holds nothing else.
    unsafe { Code::between(&raw const pvh_guest, &raw const pvh_guest_end) }
}

#[test]
fn a_kernel_with_no_other_entry_point_is_entered_by_pvh() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    fs::write(&path, guest().pvh_elf()).unwrap();
    let initramfs = dir.path().join("initramfs");
    fs::write(&initramfs, "the initramfs\n").unwrap();
    let bytes = 5_u64 << 30;
    let mut config = MachineConfig::new("pvh", &path);
    config.initramfs = Some(initramfs);
    config.discovery = Discovery::Acpi;
    config.memory_bytes = bytes;
    let machine = Machine::build(&host, config).unwrap();
    let reason = runtime().block_on(run(&machine));
    assert_eq!(reason, ExitReason::GuestReset);
    let shown = format!("{}\nthe initramfs\nRSD PTR ", machine.cmdline());
    assert_eq!(machine.console_tail().unwrap(), shown);
    let tables = crate::arch::layout::HIGH_RAM - crate::arch::layout::LOW_RAM_END;
    assert_eq!(machine.peek_u64(RAM_BYTES), bytes - tables);
}

#[test]
fn pvh_needs_an_entry_point_that_is_loaded() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    let with_pvh = guest().pvh_elf();
    // The note's last bytes are the entry point.
    let mut elsewhere = with_pvh.clone();
    let at = elsewhere.len() - 4;
    elsewhere[at..].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    let without = Code::new().halt();
    for (kernel, protocol) in [
        (elsewhere, BootProtocol::Auto),
        (without.elf(), BootProtocol::Pvh),
        (without.bzimage(true), BootProtocol::Pvh),
    ] {
        fs::write(&path, kernel).unwrap();
        let mut config = MachineConfig::new("pvh", &path);
        config.protocol = protocol;
        let err = Machine::build(&host, config).unwrap_err().to_string();
        assert!(err.contains("has no PVH entry point"), "{err}");
        assert!(err.contains("kernel = "), "{err}");
    }
}
