//! The device with a queue driver for a guest that speaks FUSE.

mod client;
mod confinement;
mod hostile;
mod operations;
mod ownership;
mod snapshot;
mod window;
