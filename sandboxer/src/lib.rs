//! The resident daemon: Sandbox and Task APIs over pods.
//!
//! - [`server`] starts the daemon; [`controller`] serves containerd's sandbox Controller and
//!   [`task`] the Task API of each pod.
//! - [`pod`] is a pod with its containers; [`agent`] talks to the agent in its guest and
//!   [`backend`] makes the machine it runs in.
//! - [`events`] tells containerd what happened, [`config`] is the configuration file and
//!   [`rpc`] the generated gRPC code.

pub mod agent;
pub mod backend;
pub mod causes;
pub mod cli;
pub mod config;
pub mod controller;
pub mod events;
pub mod image;
pub mod log;
pub mod pod;
pub mod rpc;
pub mod server;
pub mod task;
pub mod template;

#[cfg(test)]
mod testing;
