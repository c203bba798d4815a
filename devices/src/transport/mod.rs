//! How a driver reaches a device model.

pub mod mmio;
mod queue;
pub mod vhost_user;
