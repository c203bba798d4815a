//! Where artifacts are kept, and how two builds of the same one do not clash.

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::error::{GuestError, IoContext as _, Result};

/// The folder that holds what was built, one sub-folder per kind and digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// A cache in the given folder, which is created when first written to.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache of this user: `$KUASAR_CACHE_DIR`, else
    /// `$XDG_CACHE_HOME/kuasar-embed`, else `/var/cache/kuasar-embed` for root
    /// and `~/.cache/kuasar-embed` for anybody else.
    pub fn locate() -> Result<Self> {
        let set = |name| {
            env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        choose(
            set("KUASAR_CACHE_DIR"),
            set("XDG_CACHE_HOME"),
            set("HOME"),
            is_root(),
        )
        .map(Self::new)
        .ok_or(GuestError::NoCacheDir)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The finished artifact, if there is one.
    pub(crate) fn find(&self, kind: &str, digest: &str) -> Option<PathBuf> {
        let path = self.root.join(kind).join(digest);
        path.is_dir().then_some(path)
    }

    /// The finished artifact: the one in the cache, or the one `build` leaves
    /// in [`Scratch::out`]. Builds of one kind are made one after the other;
    /// `waiting` is called when another one is under way.
    pub(crate) fn find_or_build(
        &self,
        kind: &str,
        digest: &str,
        waiting: impl FnOnce(),
        build: impl FnOnce(&Scratch) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(found) = self.find(kind, digest) {
            return Ok(found);
        }
        let folder = self.root.join(kind);
        fs::create_dir_all(&folder).context("create", &folder)?;
        let _lock = lock(&folder.join(".lock"), waiting)?;
        if let Some(found) = self.find(kind, digest) {
            return Ok(found);
        }
        let scratch = Scratch::create(folder.join(format!(".{digest}.tmp")))?;
        build(&scratch)?;
        let path = folder.join(digest);
        fs::rename(&scratch.out, &path).context("create", &path)?;
        Ok(path)
    }

    /// Writes a file of the cache so that readers see the old or the new one.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        fs::create_dir_all(&self.root).context("create", &self.root)?;
        let path = self.root.join(name);
        let temporary = self
            .root
            .join(format!(".{name}.{}.tmp", std::process::id()));
        fs::write(&temporary, content).context("write", &temporary)?;
        fs::rename(&temporary, &path).context("write", &path)
    }
}

/// A folder to build in. It goes away with this value, finished or not.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// For anything.
    pub root: PathBuf,
    /// For what becomes the artifact.
    pub out: PathBuf,
}

impl Scratch {
    fn create(root: PathBuf) -> Result<Self> {
        // A build that was killed could not remove its own.
        if root.exists() {
            fs::remove_dir_all(&root).context("remove", &root)?;
        }
        let out = root.join("out");
        fs::create_dir_all(&out).context("create", &out)?;
        Ok(Self { root, out })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing more can be done; the next build of this digest tries again.
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// Holds the lock until the file is dropped, also by the process's end.
fn lock(path: &Path, waiting: impl FnOnce()) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .context("open", path)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => waiting(),
        Err(TryLockError::Error(e)) => return Err(e).context("lock", path),
    }
    file.lock().context("lock", path)?;
    Ok(file)
}

fn choose(
    own: Option<PathBuf>,
    xdg: Option<PathBuf>,
    home: Option<PathBuf>,
    root: bool,
) -> Option<PathBuf> {
    const NAME: &str = "kuasar-embed";
    own.or_else(|| xdg.map(|dir| dir.join(NAME)))
        .or_else(|| root.then(|| Path::new("/var/cache").join(NAME)))
        .or_else(|| home.map(|dir| dir.join(".cache").join(NAME)))
}

/// Root owns its own entry in `/proc`.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};
    use std::thread;

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"));
        (dir, cache)
    }

    fn entries(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn own_folder_wins_then_xdg_then_root_then_home() {
        let p = |s: &str| Some(PathBuf::from(s));
        assert_eq!(choose(p("/own"), p("/xdg"), p("/home"), true), p("/own"));
        assert_eq!(
            choose(None, p("/xdg"), p("/home"), true),
            p("/xdg/kuasar-embed")
        );
        assert_eq!(
            choose(None, None, p("/home"), true),
            p("/var/cache/kuasar-embed")
        );
        assert_eq!(
            choose(None, None, p("/home"), false),
            p("/home/.cache/kuasar-embed")
        );
        assert_eq!(choose(None, None, None, false), None);
    }

    #[test]
    fn concurrent_builds_make_the_artifact_once() {
        let (_dir, cache) = cache();
        let builds = AtomicUsize::new(0);
        let start = Barrier::new(2);
        let waited = AtomicUsize::new(0);
        let build = || {
            start.wait();
            cache.find_or_build(
                "kernel",
                "d",
                || {
                    waited.fetch_add(1, Ordering::SeqCst);
                },
                |scratch| {
                    builds.fetch_add(1, Ordering::SeqCst);
                    fs::write(scratch.out.join("vmlinux"), "x").context("write", &scratch.out)
                },
            )
        };
        thread::scope(|scope| {
            let one = scope.spawn(build);
            let two = scope.spawn(build);
            assert_eq!(one.join().unwrap().unwrap(), two.join().unwrap().unwrap());
        });
        assert_eq!(builds.load(Ordering::SeqCst), 1);
        assert_eq!(entries(&cache.root().join("kernel")), [".lock", "d"]);
    }

    #[test]
    fn a_second_build_waits_and_says_so() {
        let (_dir, cache) = cache();
        let (entered_tx, entered_rx) = mpsc::channel();
        let (waiting_tx, waiting_rx) = mpsc::channel();
        thread::scope(|scope| {
            let cache = &cache;
            let first = scope.spawn(move || {
                cache.find_or_build(
                    "kernel",
                    "d",
                    || {},
                    |_| {
                        entered_tx.send(()).unwrap();
                        // Goes on only when the second one has found the lock taken.
                        waiting_rx.recv().unwrap();
                        Ok(())
                    },
                )
            });
            entered_rx.recv().unwrap();
            let second = cache.find_or_build(
                "kernel",
                "d",
                || waiting_tx.send(()).unwrap(),
                |_| panic!("built twice"),
            );
            assert_eq!(second.unwrap(), first.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_dir, cache) = cache();
        let failed = cache.find_or_build(
            "kernel",
            "d",
            || {},
            |scratch| {
                fs::write(scratch.root.join("half"), "x").unwrap();
                Err(GuestError::NoCacheDir)
            },
        );
        assert!(matches!(failed, Err(GuestError::NoCacheDir)));
        assert_eq!(entries(&cache.root().join("kernel")), [".lock"]);
        assert_eq!(cache.find("kernel", "d"), None);
    }

    #[test]
    fn what_a_killed_build_left_is_removed() {
        let (_dir, cache) = cache();
        let stale = cache.root().join("kernel/.d.tmp/out");
        fs::create_dir_all(&stale).unwrap();
        fs::write(stale.join("stale"), "x").unwrap();
        let path = cache
            .find_or_build("kernel", "d", || {}, |_| Ok(()))
            .unwrap();
        assert!(entries(&path).is_empty());
    }
}
