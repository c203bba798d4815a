//! How a driver reaches a device model.

pub mod mmio;
