//! Where an image's blobs come from, and which image of several is meant.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::{Digest, ImageConfiguration};

use super::archive::Archive;
use super::reference::Reference;
use super::{ImageError, docker, oci};

/// Largest JSON document of an image.
const MAX_DOCUMENT_BYTES: u64 = 8 << 20;

/// A folder or an archive with the files of an image.
#[derive(Debug)]
pub(super) enum Files {
    Folder(PathBuf),
    Archive(Archive),
}

impl Files {
    fn contains(&self, name: &str) -> bool {
        match self {
            Self::Folder(path) => path.join(name).is_file(),
            Self::Archive(archive) => archive.contains(name),
        }
    }

    /// Opens one file, with its size.
    pub(super) fn open(&self, name: &str) -> io::Result<(Box<dyn Read + Send>, u64)> {
        match self {
            Self::Folder(path) => {
                let path = path.join(name);
                if !path.metadata()?.is_file() {
                    return Err(io::Error::other("not a regular file"));
                }
                let file = File::open(path)?;
                let size = file.metadata()?.len();
                Ok((Box::new(file), size))
            }
            Self::Archive(archive) => archive.open_member(name),
        }
    }

    /// Reads a whole document.
    pub(super) fn document(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let read = || -> io::Result<Vec<u8>> {
            let (reader, size) = self.open(name)?;
            if size > MAX_DOCUMENT_BYTES {
                return Err(io::Error::other(format!(
                    "{size} bytes; a document has at most {MAX_DOCUMENT_BYTES}"
                )));
            }
            let mut content = Vec::new();
            reader.take(MAX_DOCUMENT_BYTES).read_to_end(&mut content)?;
            Ok(content)
        };
        read().map_err(|e| ImageError::malformed(name, &e))
    }
}

/// One layer of a chosen image.
#[derive(Clone, Debug)]
pub(super) struct LayerSource {
    /// File in the image.
    pub(super) file: String,
    /// Digest and size of the file, where the format has them.
    pub(super) blob: Option<(Digest, u64)>,
    /// Digest of the plain tar.
    pub(super) diff_id: Digest,
    /// The file is no tar but a WebAssembly program, which gets this name.
    pub(super) program: Option<String>,
}

/// One image, chosen and with its documents verified.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) files: Files,
    /// What the cache is addressed by.
    pub(super) digest: Digest,
    pub(super) config: ImageConfiguration,
    pub(super) layers: Vec<LayerSource>,
}

/// Opens what the user named and chooses the image meant.
pub(super) fn choose(
    reference: &Reference,
    scratch: &Path,
    max_bytes: u64,
) -> Result<Chosen, ImageError> {
    let path = &reference.path;
    let selector = reference.selector.as_deref();
    let files = if path.is_dir() {
        Files::Folder(path.clone())
    } else {
        Files::Archive(Archive::open(path, scratch, max_bytes)?)
    };
    // Current docker archives are both; the layout has more digests.
    if files.contains("oci-layout") && files.contains("index.json") {
        return oci::choose(files, selector);
    }
    if files.contains("manifest.json") {
        return docker::choose(files, selector);
    }
    Err(ImageError::NotAnImage {
        path: path.clone(),
        why: "it has neither oci-layout and index.json (OCI layout) nor manifest.json (docker archive)",
    })
}

/// Pairs layer files with the digests of their content.
pub(super) fn diff_ids(
    config: &ImageConfiguration,
    layers: usize,
) -> Result<Vec<Digest>, ImageError> {
    let ids = config.rootfs().diff_ids();
    if ids.len() != layers {
        return Err(ImageError::malformed(
            "configuration",
            &format!("it names {} layers, the manifest {layers}", ids.len()),
        ));
    }
    ids.iter()
        .map(|id| id.parse().map_err(|e| ImageError::malformed("diff_id", &e)))
        .collect()
}

/// This machine as `os`, `architecture` in image terms.
pub(super) fn host_platform() -> (&'static str, &'static str) {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    ("linux", architecture)
}

/// Architecture of images that hold a WebAssembly program.
pub(super) const WASM: &str = "wasm";

/// Refuses an image of another platform.
pub(super) fn check_platform(config: &ImageConfiguration) -> Result<(), ImageError> {
    let (os, architecture) = host_platform();
    let found = (config.os().to_string(), config.architecture().to_string());
    if (found.0 == os && found.1 == architecture) || found.1 == WASM {
        return Ok(());
    }
    Err(ImageError::Platform {
        wanted: format!("{os}/{architecture}"),
        found: vec![format!("{}/{}", found.0, found.1)],
    })
}
