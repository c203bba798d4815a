//! Builds what a guest boots: a Linux kernel and an initramfs.
//!
//! The kernel comes from the distribution's own source package, configured by
//! the fragments and changed by the patches that are embedded in this crate
//! (`kernel/`). The initramfs holds one program, the agent, as `/init`. Both
//! are kept in a cache under a digest of everything they were made from, so a
//! second build with the same inputs finds the first one.
//!
//! ```no_run
//! use guest_image::{Cache, GuestImage, Initramfs, KernelRecipe};
//!
//! # fn main() -> guest_image::Result<()> {
//! let cache = Cache::locate()?;
//! let recipe = KernelRecipe::locate()?;
//! let initramfs = Initramfs::new("target/release/vmm-task");
//! let image = GuestImage::build(&cache, &recipe, &initramfs, &mut |p| eprintln!("{p}"))?;
//! image.make_current(&cache)?;
//! println!("{}", image.kernel.display());
//! # Ok(())
//! # }
//! ```

mod cache;
mod command;
mod digest;
mod distro;
mod error;
mod image;
mod initramfs;
mod kconfig;
mod kernel;
mod packages;
mod progress;
mod recipe;
mod source;

pub use cache::Cache;
pub use distro::DistroKernel;
pub use error::{GuestError, Result};
pub use image::{GuestImage, ImageInfo};
pub use initramfs::{ExtraFile, Initramfs, InitramfsArtifact};
pub use kconfig::Mismatch;
pub use kernel::{KernelArtifact, KernelFacts};
pub use packages::{MissingTool, missing_packages};
pub use progress::{Progress, Step};
pub use recipe::{Input, KernelRecipe};
pub use source::KernelSource;
