//! The cache of unpacked images.
//!
//! `<cache>/images/<algorithm>-<digest>/` holds `rootfs/` and `config.json`. A folder of that name
//! is complete: it is filled under another name and renamed last. One lock file per image
//! makes unpacking single flight, within and between processes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use oci_spec::image::{Digest, ImageConfiguration};
use rustix::fs::FlockOperation;

use super::ImageError;
use super::blob::{self, Hashing, decompress};
use super::layer::LayerUnpacker;
use super::oci::{check_blob, parse, unknown_algorithm};
use super::reference::Reference;
use super::rootdir::RootDir;
use super::source::{Chosen, LayerSource, choose};

/// Bounds of one image, over all its layers.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Files, folders, links and whiteouts.
    pub max_entries: u64,
    /// Plain bytes.
    pub max_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_entries: 2_000_000,
            max_bytes: 64 << 30,
        }
    }
}

/// What unpacking is doing, for people who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another process unpacks the same image.
    WaitingForLock,
    /// A layer begins.
    Layer {
        /// Counted from 1.
        number: usize,
        /// Layers of the image.
        of: usize,
        /// Size of the layer as stored, in bytes, when known.
        bytes: Option<u64>,
    },
}

/// How the caller watches and stops unpacking.
pub struct UnpackControl<'a> {
    cancelled: &'a AtomicBool,
    progress: &'a dyn Fn(Progress),
}

impl std::fmt::Debug for UnpackControl<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UnpackControl")
            .field("cancelled", &self.cancelled)
            .finish_non_exhaustive()
    }
}

impl<'a> UnpackControl<'a> {
    /// Unpacking ends soon after `cancelled` is set, leaving nothing behind.
    pub fn new(cancelled: &'a AtomicBool, progress: &'a dyn Fn(Progress)) -> Self {
        Self {
            cancelled,
            progress,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// An image ready to be the lower layer of a container.
#[derive(Clone, Debug)]
pub struct UnpackedImage {
    /// Digest the cache is addressed by.
    pub digest: String,
    /// Read it, never write to it: containers share it.
    pub rootfs: PathBuf,
    /// Command, environment, user and more.
    pub config: ImageConfiguration,
    /// Whether it was already in the cache.
    pub cached: bool,
}

/// The cache.
#[derive(Debug)]
pub struct ImageStore {
    images: PathBuf,
    limits: Limits,
}

impl ImageStore {
    /// Opens, or creates with mode 0700, the cache below `cache`: images hold set-uid programs,
    /// which no other user of the machine may reach.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn open(cache: &Path, limits: Limits) -> Result<Self, ImageError> {
        let images = cache.join("images");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&images)
            .map_err(|e| ImageError::io("create", &images, e))?;
        Ok(Self { images, limits })
    }

    /// Where the cache is: `KUASAR_CACHE_DIR`, for root `/var/cache/kuasar-embed`, else
    /// `kuasar-embed` in the user's XDG cache folder.
    #[must_use]
    pub fn default_cache() -> PathBuf {
        let var = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        if let Some(dir) = var("KUASAR_CACHE_DIR") {
            return dir;
        }
        if rustix::process::geteuid().is_root() {
            return "/var/cache/kuasar-embed".into();
        }
        var("XDG_CACHE_HOME")
            .or_else(|| var("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("kuasar-embed")
    }

    /// Makes the image that `reference` (`PATH[:TAG]` or `PATH@DIGEST`) names available.
    /// Blocks; run it where blocking is allowed.
    ///
    /// # Errors
    /// [`ImageError`]; nothing half done stays in the cache.
    pub fn unpack(
        &self,
        reference: &str,
        control: &UnpackControl<'_>,
    ) -> Result<UnpackedImage, ImageError> {
        let reference = Reference::parse(reference)?;
        let chosen = choose(&reference, &self.images, self.limits.max_bytes)?;
        let name = format!("{}-{}", chosen.digest.algorithm(), chosen.digest.digest());
        let place = self.images.join(&name);
        if let Some(image) = cached(&place, &chosen.digest)? {
            return Ok(image);
        }
        let _lock = self.lock(&name, control)?;
        if let Some(image) = cached(&place, &chosen.digest)? {
            return Ok(image);
        }
        let partial = Partial::create(self.images.join(format!(".partial-{name}")))?;
        self.fill(&partial.path, &chosen, control)?;
        partial.publish(&place)?;
        tracing::info!(digest = %chosen.digest, "image unpacked");
        Ok(UnpackedImage {
            digest: chosen.digest.to_string(),
            rootfs: place.join("rootfs"),
            config: chosen.config,
            cached: false,
        })
    }

    fn fill(
        &self,
        place: &Path,
        chosen: &Chosen,
        control: &UnpackControl<'_>,
    ) -> Result<(), ImageError> {
        let config = place.join("config.json");
        chosen
            .config
            .to_file(&config)
            .map_err(|e| ImageError::io("write", &config, io::Error::other(e)))?;
        let rootfs = place.join("rootfs");
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&rootfs)
            .map_err(|e| ImageError::io("create", &rootfs, e))?;
        let root = RootDir::open(&rootfs).map_err(|e| ImageError::io("open", &rootfs, e))?;
        let mut unpacker = LayerUnpacker::new(&root, &self.limits, control);
        for (index, layer) in chosen.layers.iter().enumerate() {
            let number = index.saturating_add(1);
            let of = chosen.layers.len();
            (control.progress)(Progress::Layer {
                number,
                of,
                bytes: layer.blob.as_ref().map(|(_, size)| *size),
            });
            let label = format!("layer {number} of {of} ({})", layer.diff_id);
            match &layer.program {
                None => apply(&mut unpacker, chosen, layer, &label)?,
                Some(name) => {
                    let bytes = self.limits.max_bytes;
                    copy_program(&rootfs.join(name), chosen, layer, &label, bytes)?;
                }
            }
        }
        // The rename must not reach the disk before the content does.
        root.syncable()
            .and_then(|fd| Ok(rustix::fs::syncfs(fd)?))
            .map_err(|e| ImageError::io("sync", &rootfs, e))
    }

    fn lock(&self, name: &str, control: &UnpackControl<'_>) -> Result<File, ImageError> {
        let path = self.images.join(format!(".lock-{name}"));
        let lock_error = |e| ImageError::io("lock", &path, e);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(lock_error)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => (control.progress)(Progress::WaitingForLock),
            Err(e) => return Err(lock_error(e.into())),
        }
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| lock_error(e.into()))?;
        Ok(file)
    }
}

fn apply(
    unpacker: &mut LayerUnpacker<'_>,
    chosen: &Chosen,
    layer: &LayerSource,
    label: &str,
) -> Result<(), ImageError> {
    let unreadable = |source| ImageError::Layer {
        layer: label.to_owned(),
        source,
    };
    let (raw, _) = chosen.files.open(&layer.file).map_err(unreadable)?;
    let algorithm = layer.blob.as_ref().map_or(&layer.diff_id, |(d, _)| d);
    let mut stored =
        Hashing::new(raw, algorithm.algorithm()).ok_or_else(|| unknown_algorithm(algorithm))?;
    let plain = decompress(blob::buffered(&mut stored)).map_err(unreadable)?;
    let mut plain = Hashing::new(plain, layer.diff_id.algorithm())
        .ok_or_else(|| unknown_algorithm(&layer.diff_id))?;
    unpacker.apply(&mut plain, label)?;
    let (content, _) = plain.finish().map_err(unreadable)?;
    let (found, bytes) = stored.finish().map_err(unreadable)?;
    if let Some((digest, size)) = &layer.blob {
        check_blob(label, digest, *size, &found, bytes)?;
    }
    if layer.diff_id.digest() != content {
        return Err(ImageError::Digest {
            what: label.to_owned(),
            expected: layer.diff_id.to_string(),
            found: content,
        });
    }
    Ok(())
}

/// Takes a layer that is a program, as a file.
fn copy_program(
    path: &Path,
    chosen: &Chosen,
    layer: &LayerSource,
    label: &str,
    max_bytes: u64,
) -> Result<(), ImageError> {
    let unreadable = |source| ImageError::Layer {
        layer: label.to_owned(),
        source,
    };
    let (raw, _) = chosen.files.open(&layer.file).map_err(unreadable)?;
    let mut stored = Hashing::new(raw, layer.diff_id.algorithm())
        .ok_or_else(|| unknown_algorithm(&layer.diff_id))?;
    let mut file = File::create_new(path).map_err(|e| ImageError::io("create", path, e))?;
    let mut bounded = io::Read::take(&mut stored, max_bytes);
    io::copy(&mut bounded, &mut file).map_err(unreadable)?;
    let (found, bytes) = stored.finish().map_err(unreadable)?;
    match &layer.blob {
        Some((digest, size)) => check_blob(label, digest, *size, &found, bytes),
        None => Ok(()),
    }
}

/// The image at `place`, if it is there. Only a finished image has that name.
fn cached(place: &Path, digest: &Digest) -> Result<Option<UnpackedImage>, ImageError> {
    let config = place.join("config.json");
    let content = match fs::read(&config) {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ImageError::io("read", config, e)),
    };
    Ok(Some(UnpackedImage {
        digest: digest.to_string(),
        rootfs: place.join("rootfs"),
        config: parse("cached configuration", &content)?,
        cached: true,
    }))
}

/// A folder being filled; removed unless published.
struct Partial {
    path: PathBuf,
    published: bool,
}

impl Partial {
    /// Under the image's lock, so that what is there was left by a crash.
    fn create(path: PathBuf) -> Result<Self, ImageError> {
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(ImageError::io("remove", path, e));
            }
            _ => {}
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| ImageError::io("create", &path, e))?;
        Ok(Self {
            path,
            published: false,
        })
    }

    fn publish(mut self, place: &Path) -> Result<(), ImageError> {
        fs::rename(&self.path, place).map_err(|e| ImageError::io("rename", &self.path, e))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(e) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot remove partial image");
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
