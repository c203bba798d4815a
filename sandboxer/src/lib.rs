//! The resident daemon: Sandbox and Task APIs over pods.

pub mod image;
pub mod rpc;
