//! Guests of a few instructions, in ELF files that the machine boots like kernels.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the code is loaded and starts.
const LOAD_ADDRESS: u32 = 0x10_0000;
/// Port of the serial console.
pub const SERIAL: u16 = 0x3f8;
/// Where a guest counts.
pub const COUNTER: u32 = 0x20_0000;
/// A port nobody answers.
pub const NOWHERE: u16 = 0x80;
/// The first virtio-mmio device.
pub const FIRST_DEVICE: u32 = 0xd000_0000;

/// 64-bit code, put together instruction by instruction.
#[derive(Clone, Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    /// What the assembler has put between two symbols.
    ///
    /// # Safety
    /// They are in one section, with nothing but constant bytes between.
    pub unsafe fn between(start: *const u8, end: *const u8) -> Self {
        // SAFETY: as the caller promises.
        let bytes = unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
        Self(bytes.to_vec())
    }

    fn then(mut self, bytes: &[&[u8]]) -> Self {
        self.0.extend(bytes.concat());
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        self.then(&[&[0x66, 0xba], &port.to_le_bytes(), &[0xb0, value, 0xee]])
    }

    /// Writes to the serial console.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL, byte))
    }

    /// Pulses the reset line of the keyboard controller, then halts.
    pub fn reset(self) -> Self {
        self.out(0x64, 0xfe).halt()
    }

    /// `hlt` for ever.
    pub fn halt(self) -> Self {
        self.then(&[&[0xf4, 0xeb, 0xfd]])
    }

    /// `jmp` to itself.
    pub fn spin(self) -> Self {
        self.then(&[&[0xeb, 0xfe]])
    }

    /// Writes to a port for ever.
    pub fn write_port_for_ever(self, port: u16) -> Self {
        // mov dx, port; 1: out dx, al; jmp 1b
        self.then(&[&[0x66, 0xba], &port.to_le_bytes(), &[0xee, 0xeb, 0xfd]])
    }

    /// Counts at [`COUNTER`], and prints a dot each 64 counts.
    pub fn count_for_ever(self) -> Self {
        let counter = COUNTER.to_le_bytes();
        self.then(&[
            // 1: inc dword [counter]; mov eax, [counter]
            &[0xff, 0x04, 0x25],
            &counter,
            &[0x8b, 0x04, 0x25],
            &counter,
            // and eax, 63; jnz 1b
            &[0x25, 63, 0, 0, 0, 0x75, 0xeb],
            // mov dx, port; mov al, '.'; out dx, al; jmp 1b
            &[0x66, 0xba],
            &SERIAL.to_le_bytes(),
            &[0xb0, b'.', 0xee, 0xeb, 0xe2],
        ])
    }

    /// `mov ebx, address`
    pub fn base(self, address: u32) -> Self {
        self.then(&[&[0xbb], &address.to_le_bytes()])
    }

    /// `mov dword [rbx + offset], value`
    pub fn store(self, offset: u32, value: u32) -> Self {
        self.then(&[&[0xc7, 0x83], &offset.to_le_bytes(), &value.to_le_bytes()])
    }

    /// `mov eax, [rbx + offset]`
    pub fn load(self, offset: u32) -> Self {
        self.then(&[&[0x8b, 0x83], &offset.to_le_bytes()])
    }

    /// Prints the four bytes of EAX, lowest first.
    pub fn print_eax(self) -> Self {
        let print_low = [0xee, 0xc1, 0xe8, 0x08]; // out dx, al; shr eax, 8
        self.then(&[&[0x66, 0xba], &SERIAL.to_le_bytes()])
            .then(&[&print_low, &print_low, &print_low, &print_low])
    }

    /// Maps the first 2 MiB of devices and points EBX there: the machine's page tables
    /// end at 1 GiB.
    pub fn map_devices(self) -> Self {
        self.base(0xa000)
            .store(3 * 8, 0xc003)
            .store(3 * 8 + 4, 0)
            .base(0xc000)
            .store(128 * 8, FIRST_DEVICE | 0x83)
            .store(128 * 8 + 4, 0)
            .base(FIRST_DEVICE)
    }

    /// Maps the 2 MiB at 4 GiB behind the machine's own 1 GiB, and points EBX there.
    pub fn map_window(self) -> Self {
        self.base(0xa000)
            .store(8, 0xc003)
            .store(8 + 4, 0)
            .base(0xc000)
            .store(0, 0x83)
            .store(4, 1)
            .base(1 << 30)
    }

    /// Brings up the first device as a driver without queues (virtio 1.2, 3.1.1).
    pub fn drive_device(self) -> Self {
        self.store(0x70, 1)
            .store(0x70, 3)
            .store(0x24, 1)
            .store(0x20, 1)
            .store(0x70, 0xb)
            .store(0x70, 0xf)
    }

    /// `lidt` of an empty table, then `ud2`.
    pub fn triple_fault(self) -> Self {
        // lidt [rip + 2]; ud2; ten zero bytes
        self.then(&[&[0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b], &[0; 10]])
    }

    /// `popcnt eax, eax`, which KVM's emulator does not know.
    pub fn popcnt(self) -> Self {
        self.then(&[&[0xf3, 0x0f, 0xb8, 0xc0]])
    }

    /// `nop`, many times.
    pub fn nops(self, count: usize) -> Self {
        self.then(&[&vec![0x90; count]])
    }

    /// Writes the code to an ELF file in `dir`.
    pub fn kernel(&self, dir: &Path) -> PathBuf {
        let path = dir.join("vmlinux");
        fs::write(&path, self.elf()).expect("write the test kernel");
        path
    }

    /// The smallest bzImage: one setup sector, the code at the 64-bit entry point.
    pub fn bzimage(&self, entry_64: bool) -> Vec<u8> {
        const SETUP_BYTES: usize = 1024;
        let mut image = vec![0; SETUP_BYTES + 0x200];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]); // setup_sects
        put(0x202, b"HdrS");
        put(0x206, &0x20f_u16.to_le_bytes()); // version
        put(0x211, &[1]); // loadflags: loaded high
        put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
        put(0x236, &u16::from(entry_64).to_le_bytes()); // xloadflags
        put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
        image.extend(&self.0);
        image
    }

    /// One segment, loaded and entered at [`LOAD_ADDRESS`].
    pub fn elf(&self) -> Vec<u8> {
        self.elf_entered_at(LOAD_ADDRESS.into(), &[])
    }

    /// One segment, loaded at [`LOAD_ADDRESS`]; the ELF entry point is where a kernel would
    /// map itself, PVH's where it is loaded.
    pub fn pvh_elf(&self) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4, 4, 18_u32] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(LOAD_ADDRESS.to_le_bytes());
        self.elf_entered_at(0xffff_ffff_8010_0000, &note)
    }

    fn elf_entered_at(&self, entry: u64, note: &[u8]) -> Vec<u8> {
        const HEADER_BYTES: u64 = 64;
        const SEGMENT_AT: u64 = 0x1000;
        let len = self.0.len() as u64;
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend(2_u16.to_le_bytes()); // ET_EXEC
        elf.extend(62_u16.to_le_bytes()); // EM_X86_64
        elf.extend(1_u32.to_le_bytes());
        elf.extend(entry.to_le_bytes());
        elf.extend(HEADER_BYTES.to_le_bytes()); // program headers
        elf.extend(0_u64.to_le_bytes()); // section headers
        elf.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 2, 0, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        let segment = (1, 7, SEGMENT_AT, LOAD_ADDRESS.into(), len); // PT_LOAD
        let notes = (4, 4, SEGMENT_AT + len, 0, note.len() as u64); // PT_NOTE
        for (kind, flags, at, address, len) in [segment, notes] {
            elf.extend(u32::to_le_bytes(kind));
            elf.extend(u32::to_le_bytes(flags));
            for word in [at, address, address, len, len, 4] {
                elf.extend(u64::to_le_bytes(word));
            }
        }
        elf.resize(0x1000, 0);
        elf.extend(&self.0);
        elf.extend(note);
        elf
    }
}
