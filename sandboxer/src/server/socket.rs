//! The Controller's socket.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tracing::warn;

use super::ServerError;

/// A socket file that goes away with its owner.
#[derive(Debug)]
pub(super) struct ListenSocket {
    path: PathBuf,
    identity: Identity,
}

/// What tells one socket file from another: inode numbers alone are used again.
type Identity = (u64, i64, i64);

fn identity(path: &Path) -> std::io::Result<Identity> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.ino(), meta.ctime(), meta.ctime_nsec()))
}

impl ListenSocket {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    pub(super) async fn bind(path: &Path) -> Result<(UnixListener, Self), ServerError> {
        let failed = || ServerError::io(format!("listening on {}", path.display()));
        Self::clear(path).await?;
        let listener = UnixListener::bind(path).map_err(failed())?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed())?;
        let socket = Self {
            path: path.to_owned(),
            identity: identity(path).map_err(failed())?,
        };
        Ok((listener, socket))
    }

    async fn clear(path: &Path) -> Result<(), ServerError> {
        let failed = || ServerError::io(format!("replacing {}", path.display()));
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed()(e)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(failed()(std::io::Error::new(
                    ErrorKind::AlreadyExists,
                    "it is not a socket; remove it or choose another path with --listen",
                )));
            }
            Ok(_) => {}
        }
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed())
            }
            Err(e) => Err(failed()(e)),
            Ok(_) => Err(ServerError::SocketInUse(path.to_owned())),
        }
    }
}

impl Drop for ListenSocket {
    fn drop(&mut self) {
        // Not another daemon's, should one have taken the path meanwhile.
        let ours = identity(&self.path).is_ok_and(|found| found == self.identity);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_living_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (listener, socket) = ListenSocket::bind(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            ListenSocket::bind(&path).await,
            Err(ServerError::SocketInUse(_))
        ));
        // The process died: nobody listens, the file is still there.
        drop(listener);
        let (_listener, newer) = ListenSocket::bind(&path).await.unwrap();
        drop(socket);
        assert!(path.exists(), "the newer daemon's socket stays");
        drop(newer);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let error = ListenSocket::bind(&path).await.unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
