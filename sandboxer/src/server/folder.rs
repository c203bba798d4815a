//! The folder of a daemon and the lock that makes it the only one there.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::ServerError;

/// Name of the lock file in the folder.
const LOCK_FILE: &str = "daemon.lock";

/// A claimed folder; the claim ends when it is dropped, or with the process.
#[derive(Debug)]
pub(super) struct DaemonFolder {
    _lock: Flock<File>,
}

impl DaemonFolder {
    /// Creates `dir` where needed, for this user only, and locks it.
    pub(super) fn claim(dir: &Path) -> Result<Self, ServerError> {
        let failed = |what: &str| ServerError::io(format!("{what} {}", dir.display()));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("creating"))?;
        std::fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(failed("protecting"))?;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(LOCK_FILE))
            .map_err(failed("locking"))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                Err(ServerError::FolderInUse(dir.to_owned()))
            }
            Err((_, e)) => Err(failed("locking")(e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_daemon() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        let claimed = DaemonFolder::claim(&dir).unwrap();
        let mode = std::fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(matches!(
            DaemonFolder::claim(&dir),
            Err(ServerError::FolderInUse(_))
        ));
        drop(claimed);
        DaemonFolder::claim(&dir).unwrap();
    }
}
