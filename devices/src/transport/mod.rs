//! How a driver reaches a device model.
