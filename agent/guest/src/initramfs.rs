//! The initramfs: one program, and the folders it mounts things on.

use std::collections::{BTreeMap, btree_map};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, trailer};
use elf::ElfBytes;
use elf::abi::{EM_X86_64, PT_INTERP};
use elf::endian::AnyEndian;

use crate::cache::Cache;
use crate::digest;
use crate::error::{GuestError, IoContext as _, Result};

const KIND: &str = "initramfs";
const FILE: &str = "initramfs.cpio";
/// Where the guest's first process mounts what it needs.
const FOLDERS: &[&str] = &["dev", "proc", "root", "run", "sys", "tmp"];

/// What goes into an initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// The static program that becomes `/init`.
    pub init: PathBuf,
    /// More files.
    pub extra: Vec<ExtraFile>,
}

/// A file of an initramfs besides `/init`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraFile {
    /// The file on this machine.
    pub source: PathBuf,
    /// Its absolute path in the guest.
    pub path: String,
    /// Its permissions.
    pub mode: u32,
}

/// A built initramfs in the cache.
#[derive(Clone, Debug)]
pub struct InitramfsArtifact {
    /// The archive: uncompressed, because a guest whose ring 0 is emulated
    /// would take seconds to inflate it.
    pub path: PathBuf,
    /// Its digest.
    pub digest: String,
    /// Its size.
    pub size_bytes: u64,
}

impl Initramfs {
    /// An initramfs with nothing but an init program.
    pub fn new(init: impl Into<PathBuf>) -> Self {
        Self {
            init: init.into(),
            extra: Vec::new(),
        }
    }

    /// Adds a file.
    #[must_use]
    pub fn with(mut self, source: impl Into<PathBuf>, path: impl Into<String>, mode: u32) -> Self {
        self.extra.push(ExtraFile {
            source: source.into(),
            path: path.into(),
            mode,
        });
        self
    }

    /// Writes the archive into the cache, if it is not there.
    pub fn build(&self, cache: &Cache) -> Result<InitramfsArtifact> {
        let archive = self.archive()?;
        let digest = digest::of_bytes(&archive);
        let folder = cache.find_or_build(
            KIND,
            &digest,
            || {},
            |scratch| {
                let path = scratch.out.join(FILE);
                fs::write(&path, &archive).context("write", &path)
            },
        )?;
        Ok(InitramfsArtifact {
            path: folder.join(FILE),
            digest,
            size_bytes: u64::try_from(archive.len()).unwrap_or(u64::MAX),
        })
    }

    /// The archive. Its bytes depend on paths, permissions and contents only.
    fn archive(&self) -> Result<Vec<u8>> {
        let mut writer = Vec::new();
        let written = self
            .entries()?
            .into_iter()
            .zip(1..)
            .try_fold(&mut writer, |writer, ((path, entry), inode)| {
                write_entry(writer, &path, &entry, inode)
            });
        written
            .and_then(|w| trailer(w).map(drop))
            .context("pack", &self.init)?;
        Ok(writer)
    }

    /// What the archive holds. The order of a map of paths puts each folder
    /// before what is in it.
    fn entries(&self) -> Result<BTreeMap<String, Entry>> {
        let mut entries = BTreeMap::new();
        for folder in FOLDERS {
            entries.insert((*folder).to_owned(), Entry::Folder);
        }
        // The kernel opens it as the first process's standard streams before
        // that process can mount anything.
        entries.insert("dev/console".to_owned(), Entry::Console);
        entries.insert(
            "init".to_owned(),
            Entry::File(read_init(&self.init)?, 0o755),
        );
        for file in &self.extra {
            let path = guest_path(&file.path)?;
            for (end, _) in path.match_indices('/') {
                let (folder, _) = path.split_at(end);
                match entries.entry(folder.to_owned()) {
                    btree_map::Entry::Vacant(place) => drop(place.insert(Entry::Folder)),
                    btree_map::Entry::Occupied(there) if matches!(there.get(), Entry::Folder) => {}
                    btree_map::Entry::Occupied(_) => {
                        return Err(bad(&file.path, "one of its folders is a file"));
                    }
                }
            }
            let content = fs::read(&file.source).context("read", &file.source)?;
            let entry = Entry::File(content, file.mode & 0o7777);
            if entries.insert(path.to_owned(), entry).is_some() {
                return Err(bad(&file.path, "it is there already"));
            }
        }
        Ok(entries)
    }
}

#[derive(Debug)]
enum Entry {
    Folder,
    File(Vec<u8>, u32),
    Console,
}

fn write_entry<'w>(
    writer: &'w mut Vec<u8>,
    path: &str,
    entry: &Entry,
    inode: u32,
) -> io::Result<&'w mut Vec<u8>> {
    const FILE: u32 = 0o100_000;
    const FOLDER: u32 = 0o040_000;
    const CHARACTER_DEVICE: u32 = 0o020_000;
    let header = Builder::new(path)
        .ino(inode)
        .uid(0)
        .gid(0)
        .mtime(0)
        .nlink(1);
    let (header, content): (_, &[u8]) = match entry {
        Entry::Folder => (header.mode(FOLDER | 0o755).nlink(2), &[]),
        Entry::File(content, mode) => (header.mode(FILE | mode), content),
        Entry::Console => (
            header
                .mode(CHARACTER_DEVICE | 0o600)
                .rdev_major(5)
                .rdev_minor(1),
            &[],
        ),
    };
    let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut file = header.write(writer, size);
    file.write_all(content)?;
    file.finish()
}

/// The init program, checked for what would otherwise be a guest that panics
/// without a word.
fn read_init(path: &Path) -> Result<Vec<u8>> {
    let not_init = |reason: &str| GuestError::NotAnInit {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let facts = fs::metadata(path).context("read", path)?;
    if facts.permissions().mode() & 0o111 == 0 {
        return Err(not_init("it is not executable"));
    }
    let content = fs::read(path).context("read", path)?;
    let file = ElfBytes::<AnyEndian>::minimal_parse(&content)
        .map_err(|e| not_init(&format!("it is not an ELF program ({e})")))?;
    if file.ehdr.e_machine != EM_X86_64 {
        return Err(not_init("it is for another kind of CPU"));
    }
    let dynamic = file
        .segments()
        .is_some_and(|segments| segments.iter().any(|s| s.p_type == PT_INTERP));
    if dynamic {
        return Err(not_init("it needs shared libraries, the guest has none"));
    }
    Ok(content)
}

/// The path as the archive spells it.
fn guest_path(path: &str) -> Result<&str> {
    let relative = path
        .strip_prefix('/')
        .ok_or_else(|| bad(path, "it is not absolute"))?;
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    if relative.split('/').all(plain) {
        Ok(relative)
    } else {
        Err(bad(path, "it has empty, `.` or `..` parts"))
    }
}

fn bad(path: &str, reason: &'static str) -> GuestError {
    GuestError::BadEntry {
        path: path.to_owned(),
        reason,
    }
}

#[cfg(test)]
#[path = "initramfs_tests.rs"]
mod tests;
