//! Connecting to sockets that are not there yet.

use std::io;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Connects as soon as somebody listens at `path`, in a folder that exists. Whoever does has to
/// change the socket's mode then: nothing else tells that it listens.
///
/// # Errors
/// The folder cannot be watched, or the socket is not ours to connect to.
pub(crate) async fn dial(path: &Path) -> io::Result<UnixStream> {
    let is_early = |err: &io::Error| {
        matches!(
            err.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    };
    match UnixStream::connect(path).await {
        Err(err) if is_early(&err) => {}
        done => return done,
    }
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let changed = WatchFlags::CREATE | WatchFlags::ATTRIB;
    inotify::add_watch(&changes, path.parent().unwrap_or(path), changed)?;
    // SAFETY: the `AsyncFd` owns the fd, and gives nobody else a way to close it.
    let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?;
    loop {
        match UnixStream::connect(path).await {
            Err(err) if is_early(&err) => {}
            done => return done,
        }
        let mut ready = changes.readable().await?;
        // Which changes does not matter.
        let mut told = [0_u8; 4096];
        let _ = ready.try_io(|changes| Ok(rustix::io::read(changes.get_ref(), &mut told)?));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_waited_for_until_it_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late.sock");
        // Left by somebody who has ended: it refuses.
        drop(UnixListener::bind(&path).unwrap());
        let dialling = tokio::spawn({
            let path = path.clone();
            async move { dial(&path).await }
        });
        tokio::task::yield_now().await;
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        listener.accept().await.unwrap();
        dialling.await.unwrap().unwrap();
    }
}
