//! The network namespace that CNI prepared for a pod.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use rtnetlink::Handle;

use super::super::error::{PodError, Result};

/// The kernel answers netlink at once; this bounds one that does not.
const LIMIT: Duration = Duration::from_secs(10);

/// A network namespace. It stays usable when its file is unmounted or removed.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    path: PathBuf,
}

impl Namespace {
    /// Opens the namespace that is bound to `path`.
    ///
    /// # Errors
    /// `path` is missing or is no namespace.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let invalid = |fix: String| PodError::invalid("netns_path", path.to_string_lossy(), fix);
        let file = File::open(path).map_err(|e| invalid(format!("cannot be opened: {e}")))?;
        let kind = fstatfs(&file)
            .map_err(|e| invalid(format!("cannot be read: {e}")))?
            .filesystem_type();
        if kind != NSFS_MAGIC {
            return Err(invalid(
                "must be a network namespace, as made by `ip netns add`".to_owned(),
            ));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// The namespace itself.
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` inside, with a netlink connection. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be entered, `work` fails, or the kernel does not answer.
    pub(crate) fn run<T, F>(&self, work: impl FnOnce(Handle) -> F + Send) -> Result<T>
    where
        T: Send,
        F: Future<Output = Result<T>>,
    {
        self.enter(|| self.with_netlink(work))
    }

    /// Runs `work` inside. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` fails.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        // A namespace belongs to a thread: a short-lived one keeps ours as it is.
        let inside = || {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| {
                PodError::io(format!("entering {}", self.path.display()))(io::Error::from(e))
            })?;
            work()
        };
        std::thread::scope(|scope| {
            let worker = scope.spawn(inside);
            let done = worker.join();
            done.unwrap_or(Err(PodError::Cancelled("work in the network namespace")))
        })
    }

    fn with_netlink<T, F>(&self, work: impl FnOnce(Handle) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let failed =
            |what: &str| PodError::io::<io::Error>(format!("{what} {}", self.path.display()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed("working in"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(failed("opening netlink in"))?;
            tokio::spawn(connection);
            tokio::time::timeout(LIMIT, work(handle))
                .await
                .unwrap_or_else(|_| {
                    Err(failed("waiting for the kernel in")(io::Error::from(
                        io::ErrorKind::TimedOut,
                    )))
                })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_are_accepted() {
        for path in ["/etc/passwd", "/nonexistent"] {
            let error = Namespace::open(Path::new(path)).unwrap_err().to_string();
            assert!(
                error.contains("netns_path") && error.contains(path),
                "{error}"
            );
        }
    }

    #[test]
    fn a_failure_inside_comes_out() {
        let namespace = Namespace::open(Path::new("/proc/self/ns/net")).unwrap();
        let failed = namespace.run(|_| async { Err::<(), _>(PodError::not_found("card", "x")) });
        assert!(failed.is_err());
        match namespace.run(|_| async { Ok(7) }) {
            Ok(seven) => assert_eq!(seven, 7),
            Err(e) => println!("skipped: {e}"),
        }
    }
}
