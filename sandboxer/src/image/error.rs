//! Why an image cannot be used.

use std::io;
use std::path::PathBuf;

/// Failure to read or unpack an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nothing is at the given path.
    #[error("image {path} does not exist")]
    Missing {
        /// What the user gave.
        path: String,
    },
    /// The path is none of the known formats.
    #[error("{path} is not an image: {why}")]
    NotAnImage {
        /// The folder or file.
        path: PathBuf,
        /// What is missing for each format.
        why: &'static str,
    },
    /// A document of the image is not what its specification says.
    #[error("{what} of the image is invalid: {why}")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Several images match, or none.
    #[error("{problem}; choose one of:\n  {}", choices.join("\n  "))]
    Choose {
        /// What was ambiguous or unknown.
        problem: String,
        /// The references that exist.
        choices: Vec<String>,
    },
    /// No variant for this machine.
    #[error("the image has no variant for {wanted}; it has: {}", found.join(", "))]
    Platform {
        /// This machine as `os/architecture`.
        wanted: String,
        /// What the image has.
        found: Vec<String>,
    },
    /// Content differs from what its digest promises.
    #[error("{what} is damaged: expected {expected}, found {found}")]
    Digest {
        /// Which blob or layer.
        what: String,
        /// Expected digest or size.
        expected: String,
        /// Digest or size of the content.
        found: String,
    },
    /// A layer could not be applied.
    #[error("{layer}: cannot unpack {entry}")]
    Entry {
        /// Which layer, counted from 1, with its digest.
        layer: String,
        /// Path inside the image.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer holds an entry that no honest image has.
    #[error("{layer}: refused entry {entry}: {why}")]
    Hostile {
        /// Which layer.
        layer: String,
        /// Path inside the image.
        entry: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A layer cannot be read or decompressed.
    #[error("{layer}: cannot be read (truncated or damaged archive)")]
    Layer {
        /// Which layer.
        layer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A bound of [`super::Limits`] was passed.
    #[error("{layer}: the image has more than {limit} {what}")]
    Limit {
        /// Which layer.
        layer: String,
        /// What is counted.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// The caller gave up.
    #[error("unpacking was cancelled")]
    Cancelled,
    /// A file of the image or of the cache.
    #[error("cannot {what} {path}")]
    Io {
        /// Verb phrase.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    pub(super) fn io(what: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.into(),
            source,
        }
    }

    pub(super) fn malformed(what: impl Into<String>, why: &(impl ToString + ?Sized)) -> Self {
        Self::Malformed {
            what: what.into(),
            why: why.to_string(),
        }
    }

    /// The operating system's error below this one, if any.
    #[must_use]
    pub fn os_error(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Entry { source, .. } | Self::Layer { source, .. } | Self::Io { source, .. } => {
                Some(source.kind())
            }
            _ => None,
        }
    }
}
