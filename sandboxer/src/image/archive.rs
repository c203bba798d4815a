//! Random access to the files of an image archive (OCI archive or docker archive).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::ImageError;
use super::blob::{Compression, decompress};

/// An image archive has a few files per layer; more is an attack.
const MAX_FILES: usize = 100_000;
/// Links inside an archive that lead to a layer.
const MAX_LINKS: usize = 8;

#[derive(Clone, Debug)]
enum Item {
    File { offset: u64, size: u64 },
    Link(PathBuf),
}

/// The index of an archive; contents stay in the file.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    items: HashMap<PathBuf, Item>,
}

impl Archive {
    /// Reads the headers of the archive at `path`. A compressed archive is first expanded to
    /// an unnamed file in `scratch`, at most `max_bytes` of it.
    pub(super) fn open(path: &Path, scratch: &Path, max_bytes: u64) -> Result<Self, ImageError> {
        let open_error = |e| ImageError::io("open", path, e);
        let mut file = File::open(path).map_err(open_error)?;
        if !file.metadata().map_err(open_error)?.is_file() {
            return Err(ImageError::NotAnImage {
                path: path.to_owned(),
                why: "neither a folder nor a regular file",
            });
        }
        let mut magic = [0; 4];
        let read = file.read_at(&mut magic, 0).map_err(open_error)?;
        if Compression::detect(magic.get(..read).unwrap_or_default()) != Compression::None {
            file = expand(file, scratch, max_bytes)
                .map_err(|e| ImageError::io("decompress", path, e))?;
        }
        let items = index(&file).map_err(|_| ImageError::NotAnImage {
            path: path.to_owned(),
            why: "not a tar archive",
        })?;
        Ok(Self {
            file: Arc::new(file),
            items,
        })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.items.contains_key(Path::new(name))
    }

    /// A reader of one member, with its size.
    pub(super) fn open_member(&self, name: &str) -> io::Result<(Box<dyn Read + Send>, u64)> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no {name} in archive"));
        let mut path = clean(Path::new(name)).ok_or_else(missing)?;
        for _ in 0..MAX_LINKS {
            match self.items.get(&path).ok_or_else(missing)? {
                Item::File { offset, size } => {
                    let section = Section {
                        file: Arc::clone(&self.file),
                        at: *offset,
                        left: *size,
                    };
                    return Ok((Box::new(section), *size));
                }
                Item::Link(target) => {
                    let parent = path.parent().unwrap_or_else(|| Path::new(""));
                    path = clean(&parent.join(target)).ok_or_else(missing)?;
                }
            }
        }
        Err(missing())
    }
}

/// Removes `.` and resolves `..`; `None` when it leads out of the archive.
fn clean(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

fn index(file: &File) -> io::Result<HashMap<PathBuf, Item>> {
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(0))?;
    let mut tar = tar::Archive::new(reader);
    let mut items = HashMap::new();
    for entry in tar.entries_with_seek()? {
        let entry = entry?;
        let Some(name) = clean(&entry.path()?) else {
            continue;
        };
        let kind = entry.header().entry_type();
        let item = if kind.is_file() {
            Item::File {
                offset: entry.raw_file_position(),
                size: entry.size(),
            }
        } else if kind.is_symlink() || kind.is_hard_link() {
            let Some(target) = entry.link_name()? else {
                continue;
            };
            // A hard link's target counts from the top, a symbolic link's from its folder.
            let top = if kind.is_hard_link() { "/" } else { "" };
            Item::Link(Path::new(top).join(target))
        } else {
            continue;
        };
        items.insert(name, item);
        if items.len() > MAX_FILES {
            return Err(io::Error::other("too many files"));
        }
    }
    if items.is_empty() {
        return Err(io::Error::other("empty archive"));
    }
    Ok(items)
}

fn expand(file: File, scratch: &Path, max_bytes: u64) -> io::Result<File> {
    let mut plain = tempfile::tempfile_in(scratch)?;
    let mut reader = decompress(BufReader::new(file))?;
    let copied = io::copy(
        &mut reader.by_ref().take(max_bytes.saturating_add(1)),
        &mut plain,
    )?;
    if copied > max_bytes {
        return Err(io::Error::other(format!(
            "more than {max_bytes} bytes when decompressed"
        )));
    }
    Ok(plain)
}

/// Part of a file, read by position so that readers do not disturb each other.
#[derive(Debug)]
struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).map_or(buf.len(), |left| left.min(buf.len()));
        let Some(part) = buf.get_mut(..len) else {
            return Ok(0);
        };
        let read = self.file.read_at(part, self.at)?;
        let count = u64::try_from(read).map_err(io::Error::other)?;
        self.at = self.at.saturating_add(count);
        self.left = self.left.saturating_sub(count);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive_of(
        build: impl FnOnce(&mut tar::Builder<&mut Vec<u8>>),
    ) -> (tempfile::TempDir, Vec<u8>) {
        let mut bytes = Vec::new();
        let mut builder = tar::Builder::new(&mut bytes);
        build(&mut builder);
        builder.finish().unwrap();
        drop(builder);
        (tempfile::tempdir().unwrap(), bytes)
    }

    fn file(builder: &mut tar::Builder<&mut Vec<u8>>, name: &str, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, content).unwrap();
    }

    fn link(builder: &mut tar::Builder<&mut Vec<u8>>, kind: tar::EntryType, name: &str, to: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        builder.append_link(&mut header, name, to).unwrap();
    }

    fn read(archive: &Archive, name: &str) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        archive.open_member(name)?.0.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn members_and_links_are_found() {
        let (dir, bytes) = archive_of(|b| {
            file(b, "a/layer.tar", b"content");
            link(b, tar::EntryType::Symlink, "b/layer.tar", "../a/layer.tar");
            link(b, tar::EntryType::Link, "c/layer.tar", "a/layer.tar");
            link(b, tar::EntryType::Symlink, "loop", "loop");
            link(b, tar::EntryType::Symlink, "out", "../../etc/passwd");
        });
        let path = dir.path().join("x.tar");
        std::fs::write(&path, bytes).unwrap();
        let archive = Archive::open(&path, dir.path(), 1 << 20).unwrap();
        for name in [
            "a/layer.tar",
            "b/layer.tar",
            "c/layer.tar",
            "./a/./layer.tar",
        ] {
            assert_eq!(read(&archive, name).unwrap(), b"content", "{name}");
        }
        for name in ["loop", "out", "../a", "none"] {
            assert_eq!(
                read(&archive, name).unwrap_err().kind(),
                io::ErrorKind::NotFound,
                "{name}"
            );
        }
    }

    #[test]
    fn a_compressed_archive_is_expanded_within_bounds() {
        let (dir, bytes) = archive_of(|b| file(b, "f", &[7; 10_000]));
        let path = dir.path().join("x.tar.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, &bytes).unwrap();
        std::fs::write(&path, gz.finish().unwrap()).unwrap();
        let archive = Archive::open(&path, dir.path(), 1 << 20).unwrap();
        assert_eq!(read(&archive, "f").unwrap(), [7; 10_000]);
        let error = Archive::open(&path, dir.path(), 5_000).unwrap_err();
        assert!(matches!(error, ImageError::Io { .. }), "{error}");
    }

    #[test]
    fn other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for content in ["", "hello", &"x".repeat(4096)] {
            std::fs::write(&path, content).unwrap();
            let error = Archive::open(&path, dir.path(), 1 << 20).unwrap_err();
            assert!(matches!(error, ImageError::NotAnImage { .. }), "{error}");
        }
    }
}
