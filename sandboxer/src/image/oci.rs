//! OCI image layout: `index.json`, manifests and blobs by digest.

use oci_spec::image::{
    Descriptor, Digest, ImageConfiguration, ImageIndex, ImageManifest, MediaType,
};
use serde::de::DeserializeOwned;

use super::ImageError;
use super::artifact;
use super::blob;
use super::reference::names_match;
use super::source::{Chosen, Files, LayerSource, WASM, check_platform, diff_ids, host_platform};

/// Indexes inside indexes.
const MAX_INDEX_DEPTH: usize = 4;
/// Annotations that name an image in an index, the usual one first.
const NAMES: [&str; 2] = [
    "org.opencontainers.image.ref.name",
    "io.containerd.image.name",
];
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Chooses the image that `selector` names, or the only one, for this machine's platform.
pub(super) fn choose(files: Files, selector: Option<&str>) -> Result<Chosen, ImageError> {
    let index: ImageIndex = parse("index.json", &files.document("index.json")?)?;
    let candidates = select(index.manifests(), selector)?;
    let mut seen = Vec::new();
    let manifest = resolve(&files, &candidates, MAX_INDEX_DEPTH, &mut seen)?.ok_or_else(|| {
        let (os, architecture) = host_platform();
        ImageError::Platform {
            wanted: format!("{os}/{architecture}"),
            found: if seen.is_empty() {
                vec!["nothing".to_owned()]
            } else {
                seen
            },
        }
    })?;
    let digest = manifest.digest().clone();
    let manifest: ImageManifest = parse("manifest", &verified(&files, &manifest)?)?;
    if let Some(program) = artifact::program(&manifest) {
        return artifact::choose(files, digest, &program);
    }
    artifact::check_type(&manifest)?;
    let config = configuration(&files, &manifest)?;
    check_platform(&config)?;
    let ids = diff_ids(&config, manifest.layers().len())?;
    let layers = manifest
        .layers()
        .iter()
        .zip(ids)
        .map(|(layer, diff_id)| {
            if layer.media_type().as_ref().ends_with("+encrypted") {
                return Err(ImageError::malformed("layer", "it is encrypted"));
            }
            Ok(LayerSource {
                file: blob_file(layer.digest()),
                blob: Some((layer.digest().clone(), layer.size())),
                diff_id,
                program: None,
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Chosen {
        files,
        digest,
        config,
        layers,
    })
}

fn configuration(
    files: &Files,
    manifest: &ImageManifest,
) -> Result<ImageConfiguration, ImageError> {
    parse("configuration", &verified(files, manifest.config())?)
}

/// Candidates for `selector` at the top of the layout.
fn select(manifests: &[Descriptor], selector: Option<&str>) -> Result<Vec<Descriptor>, ImageError> {
    let images: Vec<&Descriptor> = manifests.iter().filter(|d| !is_attestation(d)).collect();
    let choices = || -> Vec<String> { images.iter().map(|d| label(d)).collect() };
    let Some(selector) = selector else {
        let mut names: Vec<_> = images.iter().map(|d| names(d).next()).collect();
        names.dedup();
        let same_image = names.len() == 1
            && (images.len() == 1 || images.iter().all(|d| d.platform().is_some()));
        if images.is_empty() {
            return Err(ImageError::malformed("index.json", "it lists no image"));
        }
        if !same_image {
            return Err(ImageError::Choose {
                problem: "several images are here".to_owned(),
                choices: choices(),
            });
        }
        return Ok(images.into_iter().cloned().collect());
    };
    let found: Vec<Descriptor> = images
        .iter()
        .filter(|d| {
            d.digest().as_ref() == selector || names(d).any(|name| names_match(name, selector))
        })
        .map(|d| (*d).clone())
        .collect();
    if found.is_empty() {
        return Err(ImageError::Choose {
            problem: format!("no image is called {selector}"),
            choices: choices(),
        });
    }
    Ok(found)
}

/// The first manifest for this machine, depth first through nested indexes. `seen` collects
/// the platforms passed over.
fn resolve(
    files: &Files,
    candidates: &[Descriptor],
    depth: usize,
    seen: &mut Vec<String>,
) -> Result<Option<Descriptor>, ImageError> {
    let (os, architecture) = host_platform();
    for candidate in candidates.iter().filter(|d| !is_attestation(d)) {
        if let Some(platform) = candidate.platform() {
            let found = format!("{}/{}", platform.os(), platform.architecture());
            let wasm = platform.architecture().to_string() == WASM;
            if found != format!("{os}/{architecture}") && !wasm {
                seen.push(found);
                continue;
            }
        }
        match candidate.media_type() {
            MediaType::ImageManifest => return Ok(Some(candidate.clone())),
            MediaType::Other(t) if t == DOCKER_MANIFEST => return Ok(Some(candidate.clone())),
            MediaType::ImageIndex => {}
            MediaType::Other(t) if t == DOCKER_INDEX => {}
            other => {
                seen.push(format!("an unknown kind of content, {other}"));
                continue;
            }
        }
        let Some(below) = depth.checked_sub(1) else {
            return Err(ImageError::malformed(
                "index",
                "indexes are nested too deeply",
            ));
        };
        let nested: ImageIndex = parse("index", &verified(files, candidate)?)?;
        if let Some(found) = resolve(files, nested.manifests(), below, seen)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Reads a document and checks its size and digest.
fn verified(files: &Files, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
    let digest = descriptor.digest();
    let content = files.document(&blob_file(digest))?;
    let reader = blob::Hashing::new(content.as_slice(), digest.algorithm())
        .ok_or_else(|| unknown_algorithm(digest))?;
    let (found, bytes) = reader
        .finish()
        .map_err(|e| ImageError::malformed(digest.to_string(), &e))?;
    check_blob(digest.as_ref(), digest, descriptor.size(), &found, bytes)?;
    Ok(content)
}

/// Compares what was read with what was promised.
pub(super) fn check_blob(
    what: &str,
    digest: &Digest,
    size: u64,
    found: &str,
    bytes: u64,
) -> Result<(), ImageError> {
    let (expected, found) = if bytes != size {
        (format!("{size} bytes"), format!("{bytes} bytes"))
    } else if digest.digest() != found {
        (digest.to_string(), found.to_owned())
    } else {
        return Ok(());
    };
    Err(ImageError::Digest {
        what: what.to_owned(),
        expected,
        found,
    })
}

pub(super) fn unknown_algorithm(digest: &Digest) -> ImageError {
    ImageError::malformed(
        digest.to_string(),
        "its digest is neither sha256 nor sha512",
    )
}

pub(super) fn blob_file(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.digest())
}

pub(super) fn parse<T: DeserializeOwned>(what: &str, content: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(content).map_err(|e| ImageError::malformed(what, &e))
}

fn names(descriptor: &Descriptor) -> impl Iterator<Item = &str> {
    let annotations = descriptor.annotations().as_ref();
    NAMES
        .iter()
        .filter_map(move |name| annotations?.get(*name).map(String::as_str))
}

fn label(descriptor: &Descriptor) -> String {
    match names(descriptor).last() {
        Some(name) => format!("{name}  ({})", descriptor.digest()),
        None => descriptor.digest().to_string(),
    }
}

/// Build attestations sit beside the images and are none.
fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor
        .annotations()
        .as_ref()
        .is_some_and(|a| a.contains_key("vnd.docker.reference.type"))
}
