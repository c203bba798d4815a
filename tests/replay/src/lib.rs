//! The targets of `tests/fuzz` as plain functions.
//!
//! Each file there defines one target with libFuzzer's macro. Here that macro makes a
//! function of it, so that the same code runs without libFuzzer.

// What the targets know as libFuzzer is this crate.
extern crate self as libfuzzer_sys;

macro_rules! targets {
    ($($name:ident $path:literal)*) => {
        $(
            #[path = $path]
            #[allow(unused_attributes, reason = "no_main is for libFuzzer")]
            mod $name;
        )*

        /// All targets by name.
        pub const TARGETS: &[(&str, fn(&[u8]))] = &[$((stringify!($name), $name::target)),*];
    };
}

targets! {
    balloon "../../fuzz/targets/balloon.rs"
    block "../../fuzz/targets/block.rs"
    console "../../fuzz/targets/console.rs"
    device_restore "../../fuzz/targets/device_restore.rs"
    fs "../../fuzz/targets/fs.rs"
    fuse "../../fuzz/targets/fuse.rs"
    kernel "../../fuzz/targets/kernel.rs"
    mem "../../fuzz/targets/mem.rs"
    mmio "../../fuzz/targets/mmio.rs"
    net "../../fuzz/targets/net.rs"
    oci_image "../../fuzz/targets/oci_image.rs"
    rng "../../fuzz/targets/rng.rs"
    snapshot_state "../../fuzz/targets/snapshot_state.rs"
    stream_header "../../fuzz/targets/stream_header.rs"
    vsock "../../fuzz/targets/vsock.rs"
    vsock_packets "../../fuzz/targets/vsock_packets.rs"
}

// Below its users, which find it by path, as they find libFuzzer's.
/// Stands in for libFuzzer's macro: the target's body as a function of the input.
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:expr) => {
        /// Runs one input.
        pub fn target($data: &[u8]) {
            let _ = $body;
        }
    };
    (|$data:ident: &str| $body:expr) => {
        /// Runs one input.
        pub fn target(data: &[u8]) {
            if let Ok($data) = std::str::from_utf8(data) {
                #[allow(clippy::redundant_closure_call, reason = "the body may return")]
                (|| $body)();
            }
        }
    };
}
