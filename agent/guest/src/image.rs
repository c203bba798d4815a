//! A kernel and an initramfs that belong together.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::distro::DistroKernel;
use crate::error::{GuestError, IoContext as _, Result};
use crate::initramfs::Initramfs;
use crate::kernel::{KernelArtifact, KernelFacts};
use crate::progress::{Progress, Step};
use crate::recipe::KernelRecipe;

/// Names the image that pods boot.
const CURRENT: &str = "image.json";

/// What a guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestImage {
    /// The kernel, an ELF `vmlinux`, or the bzImage of a distribution.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Digest of what the kernel was made from.
    pub kernel_digest: String,
    /// Digest of the initramfs.
    pub initramfs_digest: String,
    /// What the kernel says with `uname -r`.
    pub kernel_version: String,
    /// Size of the kernel file.
    pub kernel_size_bytes: u64,
    /// Size of the initramfs.
    pub initramfs_size_bytes: u64,
    facts: KernelFacts,
}

/// Facts about a guest image, to show or to store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The kernel file.
    pub kernel: PathBuf,
    /// What the kernel was made from.
    pub kernel_facts: KernelFacts,
    /// The initramfs file.
    pub initramfs: PathBuf,
    /// Digest of the initramfs.
    pub initramfs_digest: String,
    /// Size of the initramfs.
    pub initramfs_size_bytes: u64,
}

impl GuestImage {
    /// Builds kernel and initramfs, or finds them in the cache.
    pub fn build(
        cache: &Cache,
        recipe: &KernelRecipe,
        initramfs: &Initramfs,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let kernel = KernelArtifact::build(cache, recipe, report)?;
        report(Progress::start(Step::Packing));
        Self::of(cache, kernel.vmlinux, kernel.facts, initramfs)
    }

    /// As [`GuestImage::build`], with the distribution's kernel, whose modules are added to
    /// the initramfs.
    pub fn build_with_distro_kernel(
        cache: &Cache,
        initramfs: Initramfs,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let kernel = DistroKernel::fetch(cache, report)?;
        report(Progress::start(Step::Packing));
        let initramfs = kernel.add_to(initramfs);
        Self::of(cache, kernel.vmlinuz, kernel.facts, &initramfs)
    }

    fn of(
        cache: &Cache,
        kernel: PathBuf,
        facts: KernelFacts,
        initramfs: &Initramfs,
    ) -> Result<Self> {
        let initramfs = initramfs.build(cache)?;
        Ok(Self {
            kernel,
            initramfs: initramfs.path,
            kernel_digest: facts.digest.clone(),
            initramfs_digest: initramfs.digest,
            kernel_version: facts.version.clone(),
            kernel_size_bytes: facts.size_bytes,
            initramfs_size_bytes: initramfs.size_bytes,
            facts,
        })
    }

    /// Makes it what [`GuestImage::current`] returns.
    pub fn make_current(&self, cache: &Cache) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|source| GuestError::Damaged {
            path: cache.root().join(CURRENT),
            source,
        })?;
        cache.write(CURRENT, &text)?;
        Ok(())
    }

    /// The image that was made current last. Needs neither the kernel source nor a
    /// compiler, only the cache.
    pub fn current(cache: &Cache) -> Result<Self> {
        let path = cache.root().join(CURRENT);
        if !path.exists() {
            return Err(GuestError::NotBuilt(cache.root().to_owned()));
        }
        let text = fs::read(&path).context("read", &path)?;
        let image: Self =
            serde_json::from_slice(&text).map_err(|source| GuestError::Damaged { path, source })?;
        if image.kernel.is_file() && image.initramfs.is_file() {
            Ok(image)
        } else {
            Err(GuestError::NotBuilt(cache.root().to_owned()))
        }
    }

    /// Everything known about the image.
    pub fn info(&self) -> ImageInfo {
        ImageInfo {
            kernel: self.kernel.clone(),
            kernel_facts: self.facts.clone(),
            initramfs: self.initramfs.clone(),
            initramfs_digest: self.initramfs_digest.clone(),
            initramfs_size_bytes: self.initramfs_size_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_image_the_error_says_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = GuestImage::current(&Cache::new(dir.path())).unwrap_err();
        assert!(
            error.to_string().contains("kuasar-ctl guest build"),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CURRENT), "{").unwrap();
        let error = GuestImage::current(&Cache::new(dir.path())).unwrap_err();
        assert!(matches!(error, GuestError::Damaged { .. }), "{error}");
    }
}
