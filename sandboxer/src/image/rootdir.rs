//! A directory tree that nothing escapes from.
//!
//! All paths are resolved by the kernel with `openat2(2)` and `RESOLVE_IN_ROOT`, as if the
//! tree were the root file system: `..` and absolute symbolic links stay inside. What is
//! created or removed is one name in an already opened folder, never followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Symbolic links stay inside the root; `/proc`-style links are refused.
const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Far more than any system's renames make necessary.
const MAX_RESOLVE_TRIES: u32 = 128;

/// The root of a tree.
#[derive(Debug)]
pub struct RootDir {
    root: OwnedFd,
    /// Where the root is on this machine, without symbolic links.
    real: PathBuf,
}

/// An opened folder inside a [`RootDir`].
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) fd: OwnedFd,
    /// Path from the root, without symbolic links.
    pub(super) real: PathBuf,
}

impl RootDir {
    /// Opens an existing folder as a root.
    ///
    /// # Errors
    /// When `path` is not a folder or the kernel has no `openat2` (Linux before 5.6).
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())?;
        let real = real_path(&root)?;
        let opened = Self { root, real };
        opened.resolve(Path::new("."), flags)?;
        Ok(opened)
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let mut tries = 0;
        loop {
            // A rename anywhere on the machine can make the kernel unsure about a `..`.
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), IN_ROOT) {
                Err(Errno::AGAIN | Errno::INTR) if tries < MAX_RESOLVE_TRIES => tries += 1,
                other => return Ok(other?),
            }
        }
    }

    /// Opens a folder, following links inside the root.
    pub(super) fn folder(&self, path: &Path) -> io::Result<Folder> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = self.resolve(path, flags)?;
        let real = real_path(&fd)?
            .strip_prefix(&self.real)
            .map_err(|_| io::Error::other("path leads out of the image"))?
            .to_owned();
        Ok(Folder { fd, real })
    }

    /// Like [`RootDir::folder`], creating what is missing with mode 0755.
    pub(super) fn folder_or_create(&self, path: &Path) -> io::Result<Folder> {
        match self.folder(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut folder = self.folder(Path::new(""))?;
        let mut walked = PathBuf::new();
        for part in path.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            walked.push(name);
            folder = match self.folder(&walked) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    rustix::fs::mkdirat(&folder.fd, name, Mode::from_raw_mode(0o755))?;
                    self.folder(&walked)?
                }
                other => other?,
            };
        }
        Ok(folder)
    }

    /// Opens what is to be mounted on, following links inside the root: a folder, or a file.
    /// What is missing is made.
    ///
    /// # Errors
    /// A link leads nowhere, or the tree cannot be written to.
    pub(crate) fn mount_point(&self, path: &Path, is_dir: bool) -> io::Result<OwnedFd> {
        let normal = |part: &Component<'_>| matches!(part, Component::Normal(_));
        let path: PathBuf = path.components().filter(normal).collect();
        if is_dir {
            return Ok(self.folder_or_create(&path)?.fd);
        }
        match self.resolve(&path, OFlags::PATH | OFlags::CLOEXEC) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let parent = self.folder_or_create(parent)?;
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        Ok(rustix::fs::openat(&parent.fd, name, create, mode)?)
    }

    /// Reads a regular file of at most `max_bytes`, following links inside the root.
    /// Never blocks on a fifo.
    ///
    /// # Errors
    /// When it is missing, not a regular file, or larger.
    pub fn read(&self, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let relative = path.strip_prefix("/").unwrap_or(path);
        // Looked at before it is opened: opening a device has side effects.
        let looked = self.resolve(relative, OFlags::PATH | OFlags::CLOEXEC)?;
        if !is_regular(&looked)? {
            return Err(io::Error::other("not a regular file"));
        }
        let fd = self.resolve(relative, flags)?;
        if !is_regular(&fd)? {
            return Err(io::Error::other("not a regular file"));
        }
        let mut content = Vec::new();
        File::from(fd)
            .take(max_bytes.saturating_add(1))
            .read_to_end(&mut content)?;
        if u64::try_from(content.len()).is_ok_and(|len| len > max_bytes) {
            return Err(io::Error::other(format!("larger than {max_bytes} bytes")));
        }
        Ok(content)
    }

    /// The root's own descriptor, for syncing.
    pub(super) fn syncable(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.root, ".", flags, Mode::empty())?)
    }
}

impl Folder {
    /// Type of one name in this folder, not followed; `None` when it is free.
    pub(super) fn kind_of(&self, name: &OsStr) -> io::Result<Option<FileType>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// A sub-folder that is really one, not a link.
    fn child(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self {
            fd: rustix::fs::openat(&self.fd, name, flags, Mode::empty())?,
            real: self.real.join(name),
        })
    }

    /// Removes `name` and all below it, except what `keep` says (asked with the path from
    /// the root). Folders that still hold something stay.
    pub(super) fn remove(&self, name: &OsStr, keep: &dyn Fn(&Path) -> bool) -> io::Result<()> {
        let Some(kind) = self.kind_of(name)? else {
            return Ok(());
        };
        let kept = keep(&self.real.join(name));
        if kind != FileType::Directory {
            if !kept {
                rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?;
            }
            return Ok(());
        }
        self.child(name)?.clear(keep)?;
        if !kept {
            match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOTEMPTY) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Removes everything in this folder, except what `keep` says.
    pub(super) fn clear(&self, keep: &dyn Fn(&Path) -> bool) -> io::Result<()> {
        let readable = rustix::fs::openat(
            &self.fd,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        // Names first: removing while reading may skip entries.
        let names = Dir::read_from(&readable)?
            .map(|entry| entry.map(|e| e.file_name().to_bytes().to_vec()))
            .collect::<Result<Vec<_>, _>>()?;
        for name in &names {
            if name != b"." && name != b".." {
                self.remove(OsStr::from_bytes(name), keep)?;
            }
        }
        Ok(())
    }
}

fn is_regular(fd: &OwnedFd) -> io::Result<bool> {
    let mode = rustix::fs::fstat(fd)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::RegularFile)
}

/// Where an opened file is. Needs `/proc`.
fn real_path(fd: &impl AsFd) -> io::Result<PathBuf> {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?.into_bytes();
    Ok(std::ffi::OsString::from_vec(path).into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, RootDir) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "host").unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        fs::write(root.join("usr/lib/file"), "guest").unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("/usr", root.join("absolute")).unwrap();
        symlink("../../../..", root.join("up")).unwrap();
        symlink("../secret", root.join("leak")).unwrap();
        symlink("/secret", root.join("usr/leak")).unwrap();
        let opened = RootDir::open(&root).unwrap();
        (dir, opened)
    }

    #[test]
    fn mount_points_are_made_and_never_outside() {
        let (dir, root) = tree();
        root.mount_point(Path::new("/etc/hosts"), false).unwrap();
        root.mount_point(Path::new("/new/folder/"), true).unwrap();
        root.mount_point(Path::new("/absolute/lib/new"), false)
            .unwrap();
        let top = dir.path().join("root");
        assert!(top.join("etc/hosts").is_file() && top.join("usr/lib/new").is_file());
        assert!(top.join("new/folder").is_dir());
        root.mount_point(Path::new("/leak"), false).unwrap_err();
        root.mount_point(Path::new("/leak/x"), true).unwrap_err();
        // `..` is left out as in any OCI runtime.
        root.mount_point(Path::new("/../etc/hosts"), false).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_are_followed_inside_only() {
        let (_dir, root) = tree();
        for path in [
            "usr/lib/file",
            "lib/file",
            "absolute/lib/file",
            "/up/lib/file",
        ] {
            assert_eq!(root.read(Path::new(path), 100).unwrap(), b"guest", "{path}");
        }
        for path in ["leak", "usr/leak", "up/secret", "../secret", "/../secret"] {
            let error = root.read(Path::new(path), 100).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path}");
        }
        assert_eq!(
            root.folder(Path::new("absolute/lib")).unwrap().real,
            Path::new("usr/lib")
        );
        assert_eq!(root.folder(Path::new("up")).unwrap().real, Path::new(""));
    }

    #[test]
    fn only_bounded_regular_files_are_read() {
        let (dir, root) = tree();
        let fifo = dir.path().join("root/fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        root.read(Path::new("fifo"), 100).unwrap_err();
        root.read(Path::new("usr"), 100).unwrap_err();
        root.read(Path::new("usr/lib/file"), 4).unwrap_err();
        assert_eq!(root.read(Path::new("usr/lib/file"), 5).unwrap(), b"guest");
    }

    #[test]
    fn missing_folders_are_created_through_links() {
        let (dir, root) = tree();
        let made = root.folder_or_create(Path::new("lib/a/b")).unwrap();
        assert_eq!(made.real, Path::new("usr/lib/a/b"));
        assert!(dir.path().join("root/usr/lib/a/b").is_dir());
        let escaped = root.folder_or_create(Path::new("up/etc")).unwrap();
        assert_eq!(escaped.real, Path::new("etc"));
        root.folder_or_create(Path::new("usr/lib/file/x"))
            .unwrap_err();
    }

    #[test]
    fn removal_keeps_what_it_is_told_and_follows_nothing() {
        let (dir, root) = tree();
        let top = root.folder(Path::new("")).unwrap();
        top.remove(OsStr::new("leak"), &|_| false).unwrap();
        top.remove(OsStr::new("absolute"), &|_| false).unwrap();
        top.remove(OsStr::new("none"), &|_| false).unwrap();
        assert!(dir.path().join("secret").exists());
        fs::write(dir.path().join("root/usr/lib/old"), "").unwrap();
        top.remove(OsStr::new("usr"), &|p| p == Path::new("usr/lib/file"))
            .unwrap();
        assert!(dir.path().join("root/usr/lib/file").exists());
        assert!(!dir.path().join("root/usr/lib/old").exists());
        top.remove(OsStr::new("usr"), &|_| false).unwrap();
        assert!(!dir.path().join("root/usr").exists());
    }
}
