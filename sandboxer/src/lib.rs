//! The resident daemon: Sandbox and Task APIs over pods.

pub mod rpc;
