//! Gives what connects to any loopback port of a network namespace to one socket.
//!
//! A BPF program of type `sk_lookup` (Linux 5.9) chooses the listening socket of an incoming
//! connection. It holds for one namespace, needs no rules of a firewall, and goes away with
//! the descriptor of its link.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// Commands of `bpf(2)`.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Helpers that the program calls.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;

/// First byte of the loopback network, 127.0.0.0/8.
const LOOPBACK: i32 = 127;

/// One instruction.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | (from << 4),
        offset,
        immediate,
    }
}

const PASS: i16 = 20;

/// If a TCP connection goes to 127.0.0.0/8, assigns it the socket in slot 0 of `map`.
fn program(map: RawFd) -> [Instruction; 22] {
    let otherwise_pass = |code, at: i16, value| instruction(code, 2, 0, PASS - at - 1, value);
    let (jne, jeq) = (0x55, 0x15);
    [
        instruction(0xbf, 6, 1, 0, 0),        // r6 = context
        instruction(0x61, 2, 6, PROTOCOL, 0), // r2 = protocol
        otherwise_pass(jne, 2, libc::IPPROTO_TCP),
        instruction(0x61, 2, 6, LOCAL_IP4, 0), // r2 = address, in the order of the wire
        instruction(0x57, 2, 0, 0, 0xff),      // its first byte, on little-endian machines
        otherwise_pass(jne, 5, LOOPBACK),
        instruction(0x62, 10, 0, -4, 0), // key = 0
        instruction(0x18, 1, 1, 0, map), // r1 = map
        instruction(0, 0, 0, 0, 0),
        instruction(0xbf, 2, 10, 0, 0), // r2 = &key
        instruction(0x07, 2, 0, 0, -4),
        instruction(0x85, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(jeq, 0, 0, PASS - 13, 0), // no socket
        instruction(0xbf, 7, 0, 0, 0),        // r7 = socket
        instruction(0xbf, 1, 6, 0, 0),
        instruction(0xbf, 2, 7, 0, 0),
        instruction(0xb7, 3, 0, 0, 0),
        instruction(0x85, 0, 0, 0, SK_ASSIGN),
        instruction(0xbf, 1, 7, 0, 0),
        instruction(0x85, 0, 0, 0, SK_RELEASE),
        instruction(0xb7, 0, 0, 0, 1), // go on, with the socket if one was assigned
        instruction(0x95, 0, 0, 0, 0),
    ]
}

/// Zero-padded as the kernel wants what it does not know.
#[derive(Debug)]
#[repr(C, align(8))]
struct Attributes([u32; 32]);

impl Attributes {
    fn new(words: &[(usize, u32)], pointers: &[(usize, *const u8)]) -> Self {
        let mut attributes = Self([0; 32]);
        let mut set = |at: usize, value: u32| {
            if let Some(word) = attributes.0.get_mut(at) {
                *word = value;
            }
        };
        for &(at, value) in words {
            set(at, value);
        }
        for &(at, pointer) in pointers {
            let address = pointer.addr() as u64;
            #[allow(clippy::cast_possible_truncation, reason = "the two halves")]
            {
                set(at, address as u32);
                set(at + 1, (address >> 32) as u32);
            }
        }
        attributes
    }
}

fn word(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Calls `bpf(2)`.
///
/// # Safety
/// The pointers in `attributes` are valid for what `command` does with them.
unsafe fn bpf(command: libc::c_long, attributes: &Attributes) -> io::Result<libc::c_long> {
    let size = size_of::<Attributes>();
    // SAFETY: the attributes outlive the call, of this size; what they point to is the
    // caller's promise.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size) };
    Ok(Errno::result(done)?)
}

/// As [`bpf`], for commands that return a descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_fd(command: libc::c_long, attributes: &Attributes) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Steers connections while it lives.
#[derive(Debug)]
pub(super) struct Steering {
    _link: OwnedFd,
}

impl Steering {
    /// Gives TCP connections to 127.0.0.0/8 in `namespace` to `listener`, which listens there.
    ///
    /// # Errors
    /// The kernel cannot, or this process may not.
    pub(super) fn new(namespace: &File, listener: &impl AsFd) -> io::Result<Self> {
        let map = Attributes::new(&[(0, MAP_TYPE_SOCKMAP), (1, 4), (2, 8), (3, 1)], &[]);
        // SAFETY: no pointers.
        let map = unsafe { bpf_fd(MAP_CREATE, &map) }?;
        let key = 0_u32;
        let value = u64::from(word(&listener.as_fd()));
        let update = Attributes::new(
            &[(0, word(&map))],
            &[(2, (&raw const key).cast()), (4, (&raw const value).cast())],
        );
        // SAFETY: key and value have the map's sizes, 4 and 8 bytes, and outlive the call.
        unsafe { bpf(MAP_UPDATE_ELEM, &update) }?;
        let code = program(map.as_raw_fd());
        let license = c"Apache-2.0";
        let count = u32::try_from(code.len()).unwrap_or(0);
        let load = Attributes::new(
            // 17: the type it is to be attached as.
            &[(0, PROG_TYPE_SK_LOOKUP), (1, count), (17, ATTACH_SK_LOOKUP)],
            &[(2, code.as_ptr().cast()), (4, license.as_ptr().cast())],
        );
        // SAFETY: that many instructions and a string, which outlive the call.
        let program = unsafe { bpf_fd(PROG_LOAD, &load) }?;
        let link = Attributes::new(
            &[
                (0, word(&program)),
                (1, word(namespace)),
                (2, ATTACH_SK_LOOKUP),
            ],
            &[],
        );
        // SAFETY: no pointers.
        let link = unsafe { bpf_fd(LINK_CREATE, &link) }?;
        Ok(Self { _link: link })
    }
}
