//! Docker archive: `manifest.json` names the configuration and the layers of each image.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::ImageError;
use super::blob::sha256;
use super::oci::parse;
use super::reference::names_match;
use super::source::{Chosen, Files, LayerSource, check_platform, diff_ids};

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Chooses the image that `selector` names, or the only one.
pub(super) fn choose(files: Files, selector: Option<&str>) -> Result<Chosen, ImageError> {
    let images: Vec<Image> = parse("manifest.json", &files.document("manifest.json")?)?;
    let image = select(&images, selector)?;
    let content = files.document(&image.config)?;
    let digest = sha256(&content);
    check_config_name(&image.config, &digest)?;
    let config: ImageConfiguration = parse("configuration", &content)?;
    check_platform(&config)?;
    let ids = diff_ids(&config, image.layers.len())?;
    let layers = image
        .layers
        .iter()
        .zip(ids)
        .map(|(file, diff_id)| LayerSource {
            file: file.clone(),
            blob: None,
            diff_id,
            program: None,
        })
        .collect();
    Ok(Chosen {
        // The configuration pins the content of every layer by its diff_id.
        digest: digest
            .parse()
            .map_err(|e| ImageError::malformed("digest", &e))?,
        files,
        config,
        layers,
    })
}

/// A configuration is usually called by its digest; then that must be true.
fn check_config_name(name: &str, digest: &str) -> Result<(), ImageError> {
    let stem = name.rsplit('/').next().unwrap_or(name);
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    let is_digest = stem.len() == 64 && stem.bytes().all(|b| b.is_ascii_hexdigit());
    if is_digest && digest.strip_prefix("sha256:") != Some(stem) {
        return Err(ImageError::Digest {
            what: format!("configuration {name}"),
            expected: format!("sha256:{stem}"),
            found: digest.to_owned(),
        });
    }
    Ok(())
}

fn select<'a>(images: &'a [Image], selector: Option<&str>) -> Result<&'a Image, ImageError> {
    let tags = |image: &Image| image.repo_tags.clone().unwrap_or_default();
    let problem = match (images, selector) {
        ([], _) => return Err(ImageError::malformed("manifest.json", "it lists no image")),
        ([only], None) => return Ok(only),
        (_, None) => "several images are here".to_owned(),
        (_, Some(selector)) => {
            let named = |image: &&Image| tags(image).iter().any(|tag| names_match(tag, selector));
            let found = images.iter().find(named);
            match found {
                Some(image) => return Ok(image),
                None => format!("no image is called {selector}"),
            }
        }
    };
    Err(ImageError::Choose {
        problem,
        choices: images
            .iter()
            .flat_map(|image| match image.repo_tags.as_deref() {
                Some([_, ..]) => tags(image),
                _ => vec![image.config.clone()],
            })
            .collect(),
    })
}
