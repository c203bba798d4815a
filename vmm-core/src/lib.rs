//! A microVM as a value.

pub mod vm;
