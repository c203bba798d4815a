//! OCI artifacts that hold a WebAssembly program instead of layers of files.
//!
//! A layer of such an artifact is the program itself, so the image made of it is a root file
//! system with that one file, which is also its entry point.

use std::path::Path;

use oci_spec::image::{
    ConfigBuilder, Descriptor, Digest, ImageConfiguration, ImageConfigurationBuilder,
    ImageManifest, RootFsBuilder,
};

use super::ImageError;
use super::oci::blob_file;
use super::source::{Chosen, Files, LayerSource};

/// Media types of layers that are programs: the CNCF's format for Wasm artifacts, the one
/// before it, and what runwasi's tools make.
const PROGRAMS: [&str; 4] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
    "application/vnd.bytecodealliance.component.layer.v0+wasm",
];

/// Where the name of a layer's file is.
const TITLE: &str = "org.opencontainers.image.title";

/// The layer of an artifact that is a program; the first, where there are several.
pub(super) fn program(manifest: &ImageManifest) -> Option<Descriptor> {
    let is_program = |layer: &&Descriptor| PROGRAMS.contains(&layer.media_type().as_ref());
    manifest.layers().iter().find(is_program).cloned()
}

/// Configurations of images, as opposed to artifacts of any kind.
const IMAGES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// Refuses artifacts that hold something else than a program.
pub(super) fn check_type(manifest: &ImageManifest) -> Result<(), ImageError> {
    let config = manifest.config().media_type().to_string();
    if IMAGES.contains(&config.as_str()) {
        return Ok(());
    }
    let layers = manifest.layers().iter();
    let layers: Vec<_> = layers.map(|layer| layer.media_type().to_string()).collect();
    Err(ImageError::malformed(
        "artifact",
        &format!(
            "it is no image ({config}) and no WebAssembly program, whose layer is {}; its layers are {}",
            PROGRAMS[0],
            layers.join(", "),
        ),
    ))
}

/// An image with nothing but the program.
pub(super) fn choose(
    files: Files,
    digest: Digest,
    program: &Descriptor,
) -> Result<Chosen, ImageError> {
    let name = name(program);
    Ok(Chosen {
        files,
        digest,
        config: config(&name)?,
        layers: vec![LayerSource {
            file: blob_file(program.digest()),
            blob: Some((program.digest().clone(), program.size())),
            diff_id: program.digest().clone(),
            program: Some(name),
        }],
    })
}

/// The last part of the layer's title, if that is a plain file name.
fn name(program: &Descriptor) -> String {
    let title = program
        .annotations()
        .as_ref()
        .and_then(|annotations| annotations.get(TITLE));
    title
        .and_then(|title| Path::new(title).file_name()?.to_str())
        .filter(|name| Path::new(name).extension().is_some_and(|end| end == "wasm"))
        .unwrap_or("app.wasm")
        .to_owned()
}

fn config(name: &str) -> Result<ImageConfiguration, ImageError> {
    let malformed = |e: &dyn std::fmt::Display| ImageError::malformed("artifact", &e.to_string());
    let rootfs = RootFsBuilder::default()
        .typ("layers")
        .diff_ids(Vec::new())
        .build()
        .map_err(|e| malformed(&e))?;
    let config = ConfigBuilder::default()
        .entrypoint(vec![format!("/{name}")])
        .build()
        .map_err(|e| malformed(&e))?;
    ImageConfigurationBuilder::default()
        .architecture(super::source::WASM)
        .os("wasi")
        .config(config)
        .rootfs(rootfs)
        .build()
        .map_err(|e| malformed(&e))
}
