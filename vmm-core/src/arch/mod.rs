//! What differs between processor architectures.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::BootError;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;
