//! Hostile guests, driven by a fuzzer.
//!
//! A target says which device it is after ([`Subject`]); [`run`] plays the guest: it reads
//! the fuzzer's bytes as a list of actions on queues, config space and resets. The device
//! runs on the fuzzer's own thread ([`InlineRunner`]), so an input does the same thing
//! every time; devices with threads of their own keep them.
//!
//! What counts as a failure, besides what the sanitizer finds: a panic, a device that
//! never comes to rest, and a device that claims to have written more than it was given
//! room for. Asking for a reset is a fine answer.

mod guest;
mod jail;
mod meter;
mod runner;

pub use arbitrary::{Result, Unstructured};
pub use devices::testing::{Buffer, RawDescriptor, TestGuest};
pub use guest::{Subject, random_chain, run};
pub use jail::{confined, fresh_dir};
pub use meter::Meter;
pub use runner::InlineRunner;

// For every target: cheap, and each binary has one allocator only.
#[global_allocator]
static METER: Meter = Meter;
