//! Files of a container, found without leaving it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::error::{Result, WasmError};

/// The root file system of a container. Links in it lead nowhere else.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
}

impl Root {
    /// Opens the folder at `path`. Blocks.
    ///
    /// # Errors
    /// It is no folder.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| WasmError::io(format!("opening {}", path.display()))(e.into()))?;
        Ok(Self { dir })
    }

    /// Opens what `program` names, as a shell would: a path, relative to `cwd` unless
    /// absolute, or a name to look for in `cwd` and then in the folders of `path`. Blocks.
    ///
    /// # Errors
    /// There is no such file.
    pub fn program(&self, program: &str, cwd: &str, path: &str) -> Result<File> {
        let candidates = if program.contains('/') {
            vec![join(cwd, program)]
        } else {
            std::iter::once(cwd)
                .chain(path.split(':').filter(|dir| !dir.is_empty()))
                .map(|dir| join(dir, program))
                .collect()
        };
        let not_found = || WasmError::NotFound {
            path: program.to_owned(),
        };
        for candidate in candidates {
            match self.file(&candidate) {
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
                Err(e) => {
                    return Err(WasmError::io(format!("opening {candidate}"))(e.into()));
                }
                Ok(file) => return Ok(file),
            }
        }
        Err(not_found())
    }

    fn file(&self, path: &str) -> rustix::io::Result<File> {
        // A fifo without a writer must not make us wait.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.dir, path, flags, Mode::empty(), resolve).map(File::from)
    }
}

fn join(dir: &str, path: &str) -> String {
    if path.starts_with('/') {
        return path.to_owned();
    }
    format!("/{}/{path}", dir.trim_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn programs_are_found_inside_only() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("root");
        std::fs::create_dir_all(root.join("usr/bin")).unwrap();
        std::fs::write(root.join("usr/bin/app.wasm"), "inside").unwrap();
        std::fs::write(top.path().join("secret"), "outside").unwrap();
        std::os::unix::fs::symlink("/usr/bin/app.wasm", root.join("link")).unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("out")).unwrap();
        let root = Root::open(&root).unwrap();
        let read = |program: &str, cwd: &str| {
            let mut text = String::new();
            root.program(program, cwd, "/bin:/usr/bin")
                .map(|mut file| file.read_to_string(&mut text).unwrap())
                .map(|_| text)
        };
        for (program, cwd) in [
            ("/usr/bin/app.wasm", "/"),
            ("app.wasm", "/"),
            ("./app.wasm", "/usr/bin"),
            ("../usr/bin/app.wasm", "/usr"),
            ("/link", "/"),
        ] {
            assert_eq!(read(program, cwd).unwrap(), "inside", "{program} in {cwd}");
        }
        for program in ["/out", "/../secret", "missing", "/missing"] {
            let error = read(program, "/").unwrap_err().to_string();
            assert!(error.contains("no such file"), "{program}: {error}");
        }
    }
}
