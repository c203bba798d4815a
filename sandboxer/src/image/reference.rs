//! How a user names an image: `PATH`, `PATH:TAG` or `PATH@DIGEST`.

use std::path::{Path, PathBuf};

use super::ImageError;

/// A path and what to select inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) path: PathBuf,
    /// Tag, full name or digest; `None` takes the only image there is.
    pub(super) selector: Option<String>,
}

impl Reference {
    /// An existing path wins over a split at `@` or at the last `:`, so that file names
    /// with colons work.
    pub(super) fn parse(text: &str) -> Result<Self, ImageError> {
        if Path::new(text).exists() {
            return Ok(Self {
                path: text.into(),
                selector: None,
            });
        }
        let splits = text.match_indices('@').chain(text.rmatch_indices(':'));
        for (at, _) in splits {
            let (path, selector) = text.split_at(at);
            let selector = selector.get(1..).unwrap_or_default();
            if !path.is_empty() && !selector.is_empty() && Path::new(path).exists() {
                return Ok(Self {
                    path: path.into(),
                    selector: Some(selector.to_owned()),
                });
            }
        }
        Err(ImageError::Missing {
            path: text.to_owned(),
        })
    }
}

/// Whether `name` (a tag, or a full name such as `docker.io/library/busybox:1`) is what the
/// user meant by `selector`.
pub(super) fn names_match(name: &str, selector: &str) -> bool {
    if name == selector {
        return true;
    }
    let tag_of = |s: &str| match s.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') => Some(tag.to_owned()),
        _ => None,
    };
    if tag_of(name).as_deref() == Some(selector) {
        return true;
    }
    let short = name
        .strip_prefix("docker.io/library/")
        .or_else(|| name.strip_prefix("docker.io/"))
        .unwrap_or(name);
    short == selector || short.strip_suffix(":latest") == Some(selector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_path_is_taken_whole() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("name:with@signs");
        std::fs::write(&odd, "").unwrap();
        let text = odd.to_str().unwrap();
        assert_eq!(
            Reference::parse(text).unwrap(),
            Reference {
                path: odd.clone(),
                selector: None
            }
        );
        let tagged = Reference::parse(&format!("{text}:v1")).unwrap();
        assert_eq!(tagged.path, odd);
        assert_eq!(tagged.selector.as_deref(), Some("v1"));
    }

    #[test]
    fn a_full_name_may_follow_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().to_str().unwrap();
        let full = Reference::parse(&format!("{text}:docker.io/library/busybox:1")).unwrap();
        assert_eq!(
            full.selector.as_deref(),
            Some("docker.io/library/busybox:1")
        );
        let digest = Reference::parse(&format!("{text}@sha256:00")).unwrap();
        assert_eq!(digest.selector.as_deref(), Some("sha256:00"));
    }

    #[test]
    fn a_missing_path_is_named() {
        let error = Reference::parse("/no/such:tag").unwrap_err();
        assert_eq!(error.to_string(), "image /no/such:tag does not exist");
    }

    #[test]
    fn short_and_full_names_match() {
        for (name, selector) in [
            ("v1", "v1"),
            ("docker.io/library/busybox:latest", "busybox"),
            ("docker.io/library/busybox:1.36", "busybox:1.36"),
            ("busybox:1.36", "1.36"),
            ("busybox:latest", "busybox"),
        ] {
            assert!(names_match(name, selector), "{name} {selector}");
        }
        assert!(!names_match("busybox:1.36", "1.3"));
        assert!(!names_match("host:5000/busybox", "5000/busybox"));
    }
}
