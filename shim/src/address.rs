//! The socket of a shim.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use sha2::{Digest, Sha256};

use crate::Error;

/// Where containerd's shims have their sockets.
const DIR: &str = "/run/containerd/s";

/// The socket of the shim that serves `group` in `namespace` of the containerd on `address`:
/// known without asking anybody, and short enough for a socket's path.
pub(crate) fn socket(address: &str, namespace: &str, group: &str) -> PathBuf {
    let named = Path::new(address).join(namespace).join(group);
    let digest = Sha256::digest(named.as_os_str().as_encoded_bytes());
    let mut name = String::new();
    for byte in digest {
        let _ = write!(name, "{byte:02x}");
    }
    Path::new(DIR).join(name)
}

/// A socket that is listened on, by us or by another shim.
#[derive(Debug)]
pub(crate) enum Bound {
    /// Nobody did before.
    Ours(UnixListener),
    /// The group has its shim.
    Theirs,
}

/// Listens on `path` unless a living shim does.
///
/// # Errors
/// The host refuses.
pub(crate) fn bind(path: &Path) -> Result<Bound, Error> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(Error::io(format!("creating {}", dir.display())))?;
    }
    // For its owner alone from the first moment on.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = bind_here(path);
    umask(before);
    bound.map_err(Error::io(format!("listening on {}", path.display())))
}

fn bind_here(path: &Path) -> std::io::Result<Bound> {
    // Of two that start at once one finds the other's socket; and one that nobody listens on
    // is replaced.
    for _ in 0..2 {
        match UnixListener::bind(path) {
            Ok(listener) => return Ok(Bound::Ours(listener)),
            Err(e) if e.kind() == ErrorKind::AddrInUse => {}
            Err(e) => return Err(e),
        }
        match UnixStream::connect(path) {
            Ok(_) => return Ok(Bound::Theirs),
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    UnixListener::bind(path).map(Bound::Ours)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_group_has_one_address() {
        let a = socket("/run/containerd/containerd.sock", "k8s.io", "pod");
        assert_eq!(a.parent().unwrap(), Path::new(DIR));
        assert_eq!(a.file_name().unwrap().len(), 64);
        assert_ne!(
            a,
            socket("/run/containerd/containerd.sock", "k8s.io", "other")
        );
        assert_ne!(a, socket("/other.sock", "k8s.io", "pod"));
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let Bound::Ours(first) = bind(&path).unwrap() else {
            panic!("nobody listens there");
        };
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(bind(&path).unwrap(), Bound::Theirs));
        drop(first);
        assert!(matches!(bind(&path).unwrap(), Bound::Ours(_)));
    }
}
