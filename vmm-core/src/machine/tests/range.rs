//! The smallest and the largest machines, with a guest that starts all its processors and
//! writes to the ends of all its memory, as the tables name them.

use super::*;
use crate::arch::layout;
use crate::memory::ram_regions;

/// Where the guest counts the bytes of RAM in its memory map.
const RAM_BYTES: u64 = 0x5000;
/// Where each processor but the first sets the bit of its APIC id.
const STARTED: u64 = 0x5008;
/// Where they start; the page's number is the vector of the start-up signal.
const TRAMPOLINE: u64 = 0x1_0000;
/// A page directory for each GiB that the guest maps.
const DIRECTORIES: u64 = 0x3_0000;

// Entered in 64-bit mode with the zero page in RSI and the first GiB mapped. It runs at
// another address than it is linked to: constants are absolute, jumps are relative.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.range_guest, "a"
    range_guest:
        // RAM entries of the zero page: 20 bytes each, start, size, type.
        lea rbx, [rsi + 0x2d0]
        movzx ebp, byte ptr [rsi + 0x1e8]
        xor r8d, r8d
    2:  cmp dword ptr [rbx + 16], 1
        jne 4f
        mov r9, [rbx]
        mov r10, [rbx + 8]
        add r8, r10
        add r10, r9
        // Each address holds itself, but where this code and the tables are.
        mov rdi, r9
        shr rdi, 32
        jz 3f
        mov rdi, r9
        call 9f
        mov [rdi], rdi
    3:  lea rdi, [r10 - 8]
        cmp rdi, 0x100000
        jb 4f
        call 9f
        mov [rdi], rdi
    4:  add rbx, 20
        dec ebp
        jnz 2b
        mov [{RAM_BYTES}], r8

        // Processors of the MP table: 20 bytes each, type 0, APIC id, version, flags.
        mov ebx, {MP_ENTRIES}
        xor r8d, r8d
    5:  cmp byte ptr [rbx], 0
        jne 6f
        movzx ecx, byte ptr [rbx + 1]
        movzx eax, byte ptr [rbx + 3]
        add ebx, 20
        test eax, 2
        jnz 5b
        bts r8d, ecx
        jmp 5b

        // INIT and start-up to all but this one.
    6:  mov edi, {TRAMPOLINE}
        lea rsi, [rip + 8f]
        mov ecx, 64
        rep movsb
        mov edi, {LAPIC}
        call 9f
        mov dword ptr [rdi + 0x300], 0xc4500
        mov dword ptr [rdi + 0x300], 0xc4600 + ({TRAMPOLINE} >> 12)
    7:  cmp [{STARTED}], r8d
        jne 7b
        mov dx, 0x64
        mov al, 0xfe
        out dx, al
    2:  hlt
        jmp 2b

        // Maps the 2 MiB around RDI.
    9:  mov rax, rdi
        shr rax, 30
        jz 3f
        mov rcx, rax
        shl rcx, 12
        add rcx, {DIRECTORIES}
        lea rdx, [rcx + 3]
        mov [{PDPT} + rax * 8], rdx
        mov rax, rdi
        shr rax, 21
        mov rdx, rax
        and eax, 511
        shl rdx, 21
        or rdx, 0x83
        mov [rcx + rax * 8], rdx
    3:  ret

        // The other processors, in real mode.
        .code16
    8:  xor ax, ax
        mov ds, ax
        mov eax, 1
        cpuid
        shr ebx, 24
        lock bts dword ptr [{STARTED}], ebx
    2:  hlt
        jmp 2b
        .code64
    range_guest_end:
    .popsection
    "#,
    RAM_BYTES = const RAM_BYTES,
    STARTED = const STARTED,
    TRAMPOLINE = const TRAMPOLINE,
    DIRECTORIES = const DIRECTORIES,
    PDPT = const layout::PDPT,
    LAPIC = const layout::LAPIC,
    // Behind the floating pointer and the table's header.
    MP_ENTRIES = const layout::MP_TABLE + 16 + 44,
);

unsafe extern "C" {
    static range_guest: u8;
    static range_guest_end: u8;
}

fn guest() -> Code {
    // SAFETY: both are in the section above, which holds nothing else.
    unsafe { Code::between(&raw const range_guest, &raw const range_guest_end) }
}

#[test]
fn machines_of_all_sizes_start_all_their_cpus_and_reach_all_their_memory() {
    let Some(host) = host() else { return };
    let gib = 1_u64 << 30;
    for (vcpus, bytes) in [
        (1, 64 << 20),
        (2, layout::DEVICE_HOLE_START),
        (8, layout::DEVICE_HOLE_START + (2 << 20)),
        (32, 6 * gib),
    ] {
        if host.facts().memory_bytes < bytes || host.facts().max_vcpus < vcpus {
            println!("skipped: {vcpus} vCPUs, {bytes} bytes: more than this host has");
            continue;
        }
        let machine = machine_with(&host, &format!("range{vcpus}"), &guest(), |mut config| {
            config.vcpus = vcpus;
            config.memory_bytes = bytes;
            config
        });
        let reason = runtime().block_on(run(&machine));
        assert_eq!(reason, ExitReason::GuestReset, "{vcpus} vCPUs");
        // All but the first.
        assert_eq!(machine.peek(STARTED), u32::MAX >> (32 - vcpus) & !1);
        // The tables below 1 MiB are no RAM.
        let counted = machine.peek_u64(RAM_BYTES);
        let tables = layout::HIGH_RAM - layout::LOW_RAM_END;
        assert_eq!(counted, bytes - tables, "{vcpus} vCPUs");
        for region in ram_regions(bytes) {
            let last = region.start + region.bytes - 8;
            assert_eq!(machine.peek_u64(last), last);
            if region.start > 0 {
                assert_eq!(machine.peek_u64(region.start), region.start);
            }
        }
    }
}
