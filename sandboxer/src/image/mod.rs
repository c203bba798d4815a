//! Container images from files: no registry, no daemon, no other tool.
//!
//! An image is a folder in the OCI image layout, an OCI archive (the same folder in a tar)
//! or a docker archive (`docker save`). [`ImageStore::unpack`] checks every digest, applies
//! the layers in order and keeps the result in a cache addressed by the image's digest, so
//! that the next container of that image starts without unpacking.
//!
//! Layers are hostile input: all file operations stay inside the root file system being
//! built (see [`rootdir`]), and sizes, counts and depths are bounded by [`Limits`].

mod archive;
mod artifact;
mod blob;
mod docker;
mod error;
mod layer;
mod meter;
mod oci;
mod reference;
mod rootdir;
mod source;
mod store;
#[cfg(test)]
mod testing;
mod user;

pub use error::ImageError;
pub use rootdir::RootDir;
pub use store::{ImageStore, Limits, Progress, UnpackControl, UnpackedImage};
pub use user::{Identity, UserError, UserSpec};
