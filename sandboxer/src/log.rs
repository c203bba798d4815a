//! What gets into the log.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Libraries whose messages a guest can cause at will, so that it could fill the log; what
/// matters of them reaches us as errors. Directives that name them bring them back.
const GUEST_DRIVEN: &str = "fuse_backend_rs=off,virtio_queue=off";

/// The filter for `directives`, such as `info` or `info,vmm_core=debug`.
///
/// # Errors
/// A directive is malformed.
pub fn filter(directives: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{GUEST_DRIVEN},{directives}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_guests_drive_are_silent_unless_asked_for() {
        let quiet = filter("info").unwrap().to_string();
        assert!(quiet.contains("virtio_queue=off"), "{quiet}");
        assert!(quiet.contains("info"), "{quiet}");
        let asked = filter("info,virtio_queue=debug").unwrap().to_string();
        assert!(asked.contains("virtio_queue=debug"), "{asked}");
        assert!(!asked.contains("virtio_queue=off"), "{asked}");
        filter("info,=,").unwrap_err();
    }
}
