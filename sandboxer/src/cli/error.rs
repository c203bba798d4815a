//! What a user is told when a command fails: what, why, and what to do next.

use std::error::Error;
use std::fmt;

use crate::image::{ImageError, UserError};

/// A command failed before or besides the container: the exit code for our own errors.
pub(super) const OWN_ERROR: u8 = 125;
/// The container's command cannot be executed.
pub(super) const NOT_EXECUTABLE: u8 = 126;
/// The container's command does not exist.
pub(super) const NOT_FOUND: u8 = 127;
/// Ended by KILL; also what the daemon reports for a process whose pod ended under it.
pub(super) const KILLED: u8 = 137;
/// `--timeout` passed.
pub(super) const TIMED_OUT: u8 = 124;

/// Result of a command.
pub(super) type Result<T> = std::result::Result<T, CliError>;

/// One line what failed, one line what to do.
#[derive(Debug)]
pub(super) struct CliError {
    /// What failed, causes joined by ": ".
    pub(super) what: String,
    /// What to do about it.
    pub(super) next: Option<String>,
    /// Exit code of the process.
    pub(super) code: u8,
}

impl CliError {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            next: None,
            code: OWN_ERROR,
        }
    }

    /// Adds the line that helps.
    #[must_use]
    pub(super) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    #[must_use]
    pub(super) fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// `what`, and the causes of `error` behind it.
    pub(super) fn caused(what: impl fmt::Display, error: &dyn Error) -> Self {
        Self::new(format!("{what}: {}", chain(error)))
    }
}

/// An error and its causes on one line; a cause that the line already tells is not repeated.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// Adds what was tried to a failed system call.
pub(super) trait Doing<T> {
    /// `cannot <what>: <cause>`.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Error> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| CliError::caused(format!("cannot {}", what()), &e))
    }
}

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        let failed = Self::new(chain(&error));
        match &error {
            ImageError::Missing { .. } => failed.next(
                "IMAGE is a file or folder: an OCI layout, an OCI archive or a docker archive \
                 (made for instance with `docker save -o image.tar NAME` or `skopeo copy`)",
            ),
            ImageError::NotAnImage { .. } => {
                failed.next("for a plain folder with a root file system use --rootfs DIR")
            }
            ImageError::Choose { .. } => failed.next("name one as PATH:TAG or PATH@DIGEST"),
            ImageError::Platform { .. } => {
                failed.next("get a variant of the image for this machine")
            }
            ImageError::Digest { .. } | ImageError::Layer { .. } | ImageError::Malformed { .. } => {
                failed.next("the file is damaged or incomplete: get it again")
            }
            ImageError::Limit { .. } => failed.next("use a smaller image"),
            ImageError::Hostile { .. } => failed.next("do not use this image: it is not honest"),
            ImageError::Cancelled => failed.code(130),
            ImageError::Entry { .. } | ImageError::Io { .. } => match error.os_error() {
                Some(std::io::ErrorKind::StorageFull) => {
                    failed.next("free some space, or set KUASAR_CACHE_DIR to another disk")
                }
                Some(std::io::ErrorKind::PermissionDenied) => {
                    failed.next("run as root, or set KUASAR_CACHE_DIR to a folder of your own")
                }
                _ => failed,
            },
        }
    }
}

impl From<UserError> for CliError {
    fn from(error: UserError) -> Self {
        Self::new(chain(&error))
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        let failed = Self::new(status.message().to_owned());
        match status.code() {
            tonic::Code::Unavailable => {
                failed.next("the daemon is gone: see its log, and start vmm-sandboxer again")
            }
            tonic::Code::DeadlineExceeded => {
                failed.next("raise [timeouts] in the daemon's configuration if this host is slow")
            }
            _ => failed,
        }
    }
}

impl From<ttrpc::Error> for CliError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::new(status.message),
            other => Self::caused("the pod's task service failed", &other)
                .next("see `kuasar-ctl inspect POD` and `kuasar-ctl logs --console POD`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layered(&'static str, #[source] Option<Box<Layered>>);

    #[test]
    fn causes_are_on_one_line_and_not_repeated() {
        let inner = Layered("no space left", None);
        let middle = Layered("write f: no space left", Some(Box::new(inner)));
        let outer = Layered("cannot unpack", Some(Box::new(middle)));
        assert_eq!(chain(&outer), "cannot unpack: write f: no space left");
    }

    #[test]
    fn image_errors_say_what_to_do() {
        let error = CliError::from(ImageError::Missing {
            path: "x".to_owned(),
        });
        assert_eq!(error.what, "image x does not exist");
        assert!(error.next.unwrap().contains("docker save"));
        assert_eq!(error.code, OWN_ERROR);
    }
}
