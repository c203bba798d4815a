//! The file `state` of a snapshot, with and without the digest that it needs.
#![no_main]

use fuzz::Meter;
use libfuzzer_sys::fuzz_target;
use vmm_core::fuzzing::{rewrite_state, seal_state};

fuzz_target!(|data: &[u8]| {
    // Each is rarely the other.
    let _ = Meter::check(data.len(), || rewrite_state(data));
    let sealed = seal_state(data);
    if let Ok(once) = Meter::check(sealed.len(), || rewrite_state(&sealed)) {
        // Numbers can be written in many ways; the one that is chosen stays.
        assert_eq!(rewrite_state(&once).unwrap(), once);
    }
});
