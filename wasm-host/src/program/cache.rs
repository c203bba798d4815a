//! Compiled code on disk.
//!
//! Compiled code is run as it is, so a file that somebody else wrote must not be taken for
//! ours: each carries a keyed digest (BLAKE3) over its name and content. The key lies outside
//! of the folder, readable by this user only. What does not match is compiled anew.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tracing::{debug, warn};
use wasmtime::Engine;

use super::Digest;
use crate::config::CacheConfig;
use crate::error::{Result, WasmError};

const MAGIC: &[u8; 8] = b"kuawasm1";
const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = blake3::OUT_LEN;

/// See the module.
#[derive(Debug)]
pub(crate) struct DiskCache {
    dir: PathBuf,
    key: [u8; KEY_BYTES],
    max_bytes: u64,
}

impl DiskCache {
    /// Opens the cache, making folder and key where needed. Blocks.
    pub(crate) fn open(config: &CacheConfig) -> Result<Self> {
        let failed = |path: &Path| WasmError::io(format!("using the cache {}", path.display()));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.dir)
            .map_err(failed(&config.dir))?;
        fs::set_permissions(&config.dir, fs::Permissions::from_mode(0o700))
            .map_err(failed(&config.dir))?;
        Ok(Self {
            dir: config.dir.clone(),
            key: key(&config.key).map_err(failed(&config.key))?,
            max_bytes: config.max_bytes,
        })
    }

    /// Code that this user compiled with an engine like this one. Blocks.
    pub(super) fn get(&self, engine: &Engine, digest: &Digest) -> Option<Vec<u8>> {
        let name = name(engine, digest);
        let path = self.dir.join(&name);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return None,
            Err(e) => {
                warn!("cannot read {}: {e}", path.display());
                return None;
            }
        };
        let mut header = [0; MAGIC.len() + MAC_BYTES];
        let mut code = Vec::new();
        let read = file
            .read_exact(&mut header)
            .and_then(|()| file.read_to_end(&mut code));
        let (magic, mac) = header.split_at(MAGIC.len());
        // Compared in constant time.
        let ours = <[u8; MAC_BYTES]>::try_from(mac)
            .is_ok_and(|mac| self.mac(&name, &code) == blake3::Hash::from_bytes(mac));
        if read.is_err() || magic != MAGIC || !ours {
            warn!("{} is damaged or not ours: compiling anew", path.display());
            return None;
        }
        // Tells what was used last.
        let _ = file.set_modified(SystemTime::now());
        Some(code)
    }

    /// Keeps `code`; a failure is only logged. Blocks.
    pub(super) fn put(&self, engine: &Engine, digest: &Digest, code: &[u8]) {
        let name = name(engine, digest);
        let path = self.dir.join(&name);
        match self.write(&path, &name, code) {
            Ok(()) => self.trim(),
            Err(e) => warn!("cannot keep compiled code in {}: {e}", path.display()),
        }
    }

    fn write(&self, path: &Path, name: &str, code: &[u8]) -> std::io::Result<()> {
        let mut aside = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)?;
        aside.write_all(MAGIC)?;
        aside.write_all(self.mac(name, code).as_bytes())?;
        aside.write_all(code)?;
        aside.persist(path)?;
        Ok(())
    }

    fn mac(&self, name: &str, code: &[u8]) -> blake3::Hash {
        let mut mac = blake3::Hasher::new_keyed(&self.key);
        mac.update(&(name.len() as u64).to_le_bytes());
        mac.update(name.as_bytes());
        mac.update(code);
        mac.finalize()
    }

    /// Removes what was used longest ago until the rest fits.
    fn trim(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let meta = entry.metadata().ok()?;
                Some((meta.modified().ok()?, meta.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, size, path) in files {
            if bytes <= self.max_bytes {
                break;
            }
            debug!("removing {}", path.display());
            if fs::remove_file(&path).is_ok() {
                bytes = bytes.saturating_sub(size);
            }
        }
    }
}

/// Names code by what it was compiled from and by.
fn name(engine: &Engine, digest: &Digest) -> String {
    // Fixed keys: the same in every process.
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{}-{:016x}", digest.to_hex(), hasher.finish())
}

/// The key in the file at `path`, made when there is none.
fn key(path: &Path) -> std::io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Ok(mut file) => {
            File::open("/dev/urandom")?.read_exact(&mut key)?;
            file.write_all(&key)?;
            file.sync_all()?;
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let mut file = File::open(path)?;
            let meta = file.metadata()?;
            if meta.uid() != nix::unistd::geteuid().as_raw() {
                return Err(std::io::Error::new(
                    ErrorKind::PermissionDenied,
                    "the key belongs to another user: remove it",
                ));
            }
            let mode = meta.permissions().mode();
            if mode & 0o077 != 0 {
                return Err(std::io::Error::new(
                    ErrorKind::PermissionDenied,
                    format!(
                        "the key is open to others (mode {:o}): remove it",
                        mode & 0o777
                    ),
                ));
            }
            file.read_exact(&mut key)?;
        }
        Err(e) => return Err(e),
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(top: &Path, max_bytes: u64) -> DiskCache {
        DiskCache::open(&CacheConfig {
            dir: top.join("cache"),
            key: top.join("key"),
            max_bytes,
        })
        .unwrap()
    }

    #[test]
    fn only_what_this_user_wrote_is_taken() {
        let top = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        let (one, two) = (blake3::hash(b"one"), blake3::hash(b"two"));
        let cache = cache(top.path(), 1 << 20);
        assert_eq!(cache.get(&engine, &one), None);
        cache.put(&engine, &one, b"code");
        assert_eq!(cache.get(&engine, &one).unwrap(), b"code");
        // Another process with the same key.
        assert_eq!(
            super::tests::cache(top.path(), 1)
                .get(&engine, &one)
                .unwrap(),
            b"code"
        );

        let path = cache.dir.join(name(&engine, &one));
        let good = fs::read(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
        // Under another name it is another program.
        fs::write(cache.dir.join(name(&engine, &two)), &good).unwrap();
        assert_eq!(cache.get(&engine, &two), None);
        for at in [0, MAGIC.len(), good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert_eq!(cache.get(&engine, &one), None, "changed at {at}");
        }
        fs::write(&path, &good[..20]).unwrap();
        assert_eq!(cache.get(&engine, &one), None);
        fs::write(&path, &good).unwrap();
        assert!(cache.get(&engine, &one).is_some());
        // With another key it is somebody else's.
        fs::remove_file(top.path().join("key")).unwrap();
        assert_eq!(super::tests::cache(top.path(), 1).get(&engine, &one), None);
    }

    #[test]
    fn the_folder_does_not_grow_beyond_its_limit() {
        let top = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        let cache = cache(top.path(), 3000);
        for n in 0..10u8 {
            cache.put(&engine, &blake3::hash(&[n]), &[n; 900]);
        }
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 3);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let top = tempfile::tempdir().unwrap();
        drop(cache(top.path(), 1));
        fs::set_permissions(top.path().join("key"), fs::Permissions::from_mode(0o644)).unwrap();
        let refused = DiskCache::open(&CacheConfig {
            dir: top.path().join("cache"),
            key: top.path().join("key"),
            max_bytes: 1,
        });
        assert!(refused.unwrap_err().to_string().contains("open to others"));
    }
}
