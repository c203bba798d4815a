//! The distribution's kernel source package.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::digest;
use crate::error::{GuestError, IoContext as _, Result};

/// The series the patches and fragments are made for.
const SERIES: &str = "6.1";
/// Where Debian puts kernel sources.
const FOLDER: &str = "/usr/src";

/// An archive of the kernel source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSource {
    /// The archive.
    pub tarball: PathBuf,
    /// Version of the package it came in, for example `6.1.153-1`.
    pub package_version: String,
}

impl KernelSource {
    /// Finds the archive of Debian's `linux-source-6.1`.
    pub fn locate() -> Result<Self> {
        let package = format!("linux-source-{SERIES}");
        let tarball = find_in(Path::new(FOLDER), &package)?;
        let package_version = installed_version(&package);
        Ok(Self {
            tarball,
            package_version,
        })
    }

    /// Digest of the archive. Its 130 MB are read once for each size and time
    /// of change; then the cache knows.
    pub(crate) fn digest(&self, cache: &Cache) -> Result<String> {
        let facts = fs::metadata(&self.tarball).context("read", &self.tarball)?;
        let mut key = digest::Fields::default();
        key.add("path", self.tarball.as_os_str().as_encoded_bytes())
            .add("size", facts.size().to_le_bytes())
            .add("seconds", facts.mtime().to_le_bytes())
            .add("nanoseconds", facts.mtime_nsec().to_le_bytes());
        let name = format!("source-{}.sha256", key.finish());
        if let Ok(known) = fs::read_to_string(cache.root().join(&name)) {
            return Ok(known);
        }
        let sum = digest::of_file(&self.tarball)?;
        cache.write(&name, sum.as_bytes())?;
        Ok(sum)
    }
}

fn find_in(folder: &Path, package: &str) -> Result<PathBuf> {
    let name = format!("{package}.tar.xz");
    let tarball = folder.join(&name);
    if tarball.is_file() {
        return Ok(tarball);
    }
    Err(GuestError::SourceMissing {
        name,
        dir: folder.to_owned(),
        package: package.to_owned(),
    })
}

/// The archive's digest decides what is built; this is for people.
fn installed_version(package: &str) -> String {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${Version}", package])
        .output()
        .ok()
        .filter(|out| out.status.success())
        .map_or_else(
            || "unknown".to_owned(),
            |out| String::from_utf8_lossy(&out.stdout).into_owned(),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_source_names_its_package() {
        let dir = tempfile::tempdir().unwrap();
        let error = find_in(dir.path(), "linux-source-6.1").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("apt-get install linux-source-6.1"),
            "{error}"
        );
    }

    #[test]
    fn the_digest_follows_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"));
        let source = KernelSource {
            tarball: dir.path().join("linux.tar.xz"),
            package_version: String::new(),
        };
        fs::write(&source.tarball, "one").unwrap();
        let one = source.digest(&cache).unwrap();
        assert_eq!(one, source.digest(&cache).unwrap());
        fs::write(&source.tarball, "two, longer").unwrap();
        assert_ne!(one, source.digest(&cache).unwrap());
    }
}
