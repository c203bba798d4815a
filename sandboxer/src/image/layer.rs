//! Applies layers (tar streams) to a root file system: OCI image specification, "Layer".

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use super::ImageError;
use super::meter::{Meter, Metered, Stop};
use super::rootdir::{Folder, RootDir};
use super::store::{Limits, UnpackControl};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// All headers of one entry together (long names, extended headers).
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Longest path in a layer, in bytes (the kernel's own bound).
const MAX_PATH_BYTES: usize = 4096;
/// Deepest folder below the root; bounds recursion and open folders when removing.
const MAX_DEPTH: usize = 256;
const COPY_BYTES: usize = 128 << 10;
const XATTR_PREFIX: &str = "SCHILY.xattr.";

/// Applies the layers of one image, in order.
pub(super) struct LayerUnpacker<'a> {
    root: &'a RootDir,
    limits: &'a Limits,
    control: &'a UnpackControl<'a>,
    /// Entries of all layers so far.
    entries: u64,
    /// Plain bytes of all layers so far.
    bytes: u64,
    /// Ownership and device nodes need root.
    privileged: bool,
    buffer: Vec<u8>,
}

/// Why an entry was not unpacked; [`LayerUnpacker::apply`] adds the layer and the path.
enum Refused {
    Hostile(&'static str),
    Limit(&'static str, u64),
    Read(io::Error),
    Write(io::Error),
}

impl From<Errno> for Refused {
    fn from(e: Errno) -> Self {
        Self::Write(e.into())
    }
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        Self::Write(e)
    }
}

/// The name an entry makes: one component in an opened folder.
struct Place {
    parent: Folder,
    name: OsString,
}

impl Place {
    fn real(&self) -> PathBuf {
        self.parent.real.join(&self.name)
    }
}

/// What one layer has done so far.
#[derive(Default)]
struct LayerState {
    /// Real paths of this layer's entries: its own whiteouts do not hide them.
    added: HashSet<PathBuf>,
    /// Times of folders, set last because filling a folder changes them.
    folder_times: Vec<(PathBuf, Timestamps)>,
}

impl<'a> LayerUnpacker<'a> {
    pub(super) fn new(
        root: &'a RootDir,
        limits: &'a Limits,
        control: &'a UnpackControl<'a>,
    ) -> Self {
        Self {
            root,
            limits,
            control,
            entries: 0,
            bytes: 0,
            privileged: rustix::process::geteuid().is_root(),
            buffer: vec![0; COPY_BYTES],
        }
    }

    /// Applies the plain tar stream `reader` to the end. `label` names the layer in errors.
    pub(super) fn apply(&mut self, reader: &mut dyn Read, label: &str) -> Result<(), ImageError> {
        let left = self.limits.max_bytes.saturating_sub(self.bytes);
        let meter = Rc::new(Meter::new(left));
        let result = self.apply_metered(reader, &meter, label);
        self.bytes = self.bytes.saturating_add(meter.taken.get());
        match meter.stopped.get() {
            Some(Stop::Cancelled) => Err(ImageError::Cancelled),
            Some(Stop::Bytes) => Err(ImageError::Limit {
                layer: label.to_owned(),
                what: "bytes",
                limit: self.limits.max_bytes,
            }),
            Some(Stop::Header) => Err(ImageError::Hostile {
                layer: label.to_owned(),
                entry: "header".to_owned(),
                why: "longer than any name or attribute may be",
            }),
            None => result,
        }
    }

    fn apply_metered(
        &mut self,
        reader: &mut dyn Read,
        meter: &Rc<Meter>,
        label: &str,
    ) -> Result<(), ImageError> {
        let unreadable = |source| ImageError::Layer {
            layer: label.to_owned(),
            source,
        };
        let mut metered = Metered {
            inner: reader,
            meter: Rc::clone(meter),
            control: self.control,
        };
        let mut state = LayerState::default();
        {
            let mut tar = tar::Archive::new(&mut metered);
            let mut entries = tar.entries().map_err(unreadable)?;
            loop {
                meter.header_left.set(Some(MAX_HEADER_BYTES));
                let Some(entry) = entries.next() else { break };
                meter.header_left.set(None);
                let mut entry = entry.map_err(unreadable)?;
                let result = self.entry(&mut entry, &mut state, meter);
                result.map_err(|refused| {
                    let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                    refused.into_error(label, path)
                })?;
                // The reader would pass over the rest as if it were part of a header.
                io::copy(&mut entry, &mut io::sink()).map_err(unreadable)?;
            }
        }
        meter.header_left.set(None);
        // Padding after the last entry belongs to the digests.
        io::copy(&mut metered, &mut io::sink()).map_err(unreadable)?;
        self.set_folder_times(&state);
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        state: &mut LayerState,
        meter: &Meter,
    ) -> Result<(), Refused> {
        self.entries = self.entries.saturating_add(1);
        if self.entries > self.limits.max_entries {
            return Err(Refused::Limit("entries", self.limits.max_entries));
        }
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let parts = parts_of(&entry.path_bytes())?;
        let (name, parent) = match parts.split_last() {
            Some((name, parent)) => (name.clone(), parent.iter().collect::<PathBuf>()),
            None if kind.is_dir() => (OsString::from("."), PathBuf::new()),
            None => return Err(Refused::Hostile("would replace the root")),
        };
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.whiteout(&parent, name.as_bytes(), hidden, state);
        }
        let parent = self.root.folder_or_create(&parent)?;
        if parent.real.components().count() >= MAX_DEPTH {
            return Err(Refused::Hostile("nested too deeply"));
        }
        let place = Place { parent, name };
        self.make_room(&place, kind)?;
        self.create(entry, &place, meter)?;
        if !kind.is_hard_link() {
            self.set_metadata(entry, &place, state)?;
        }
        state.added.insert(place.real());
        Ok(())
    }

    /// A whiteout hides what lower layers have, never what this layer adds.
    fn whiteout(
        &self,
        parent: &Path,
        name: &[u8],
        hidden: &[u8],
        state: &LayerState,
    ) -> Result<(), Refused> {
        let parent = match self.root.folder(parent) {
            Ok(parent) => parent,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let keep = |path: &Path| state.added.contains(path);
        if name == WHITEOUT_OPAQUE {
            parent.clear(&keep)?;
        } else if matches!(hidden, b"" | b"." | b"..") {
            return Err(Refused::Hostile("whiteout of no name"));
        } else if !name.starts_with(WHITEOUT_META) {
            parent.remove(OsStr::from_bytes(hidden), &keep)?;
        }
        Ok(())
    }

    /// A later entry replaces an earlier one; only folders merge with folders.
    fn make_room(&self, place: &Place, kind: EntryType) -> Result<(), Refused> {
        match place.parent.kind_of(&place.name)? {
            None => Ok(()),
            Some(FileType::Directory) if kind.is_dir() => Ok(()),
            Some(_) => Ok(place.parent.remove(&place.name, &|_| false)?),
        }
    }

    fn create<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        place: &Place,
        meter: &Meter,
    ) -> Result<(), Refused> {
        let (fd, name) = (&place.parent.fd, place.name.as_os_str());
        match entry.header().entry_type() {
            EntryType::Directory => {
                if place.parent.kind_of(name)?.is_none() {
                    rustix::fs::mkdirat(fd, name, Mode::from_raw_mode(0o755))?;
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                // A sparse file can be larger than what is read for it.
                if entry.size() > meter.left() {
                    return Err(Refused::Limit("bytes", self.limits.max_bytes));
                }
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(0o600);
                let file = File::from(rustix::fs::openat(fd, name, flags, mode)?);
                self.copy(entry, file)?;
            }
            EntryType::Symlink => {
                let target = link_target(entry)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), fd, name)?;
            }
            EntryType::Link => {
                let target = parts_of(&link_target(entry)?)?;
                let Some((file, folder)) = target.split_last() else {
                    return Err(Refused::Hostile("hard link to the root"));
                };
                let folder = self.root.folder(&folder.iter().collect::<PathBuf>())?;
                rustix::fs::linkat(&folder.fd, file, fd, name, AtFlags::empty())?;
            }
            EntryType::Fifo => self.node(place, FileType::Fifo, 0)?,
            EntryType::Char => self.device(entry, place, FileType::CharacterDevice)?,
            EntryType::Block => self.device(entry, place, FileType::BlockDevice)?,
            _ => return Err(Refused::Hostile("unknown kind of entry")),
        }
        Ok(())
    }

    /// Copies the content; long runs of zeros of sparse files become holes.
    fn copy<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        mut file: File,
    ) -> Result<(), Refused> {
        use std::io::Seek;
        let sparse = entry.header().entry_type().is_gnu_sparse();
        let size = entry.size();
        let mut copied = 0_u64;
        loop {
            let read = entry.read(&mut self.buffer).map_err(Refused::Read)?;
            if read == 0 {
                break;
            }
            let part = self.buffer.get(..read).unwrap_or_default();
            let count = u64::try_from(read).unwrap_or(u64::MAX);
            if sparse && part.iter().all(|byte| *byte == 0) {
                file.seek(io::SeekFrom::Current(i64::try_from(read).unwrap_or(0)))?;
            } else {
                file.write_all(part)?;
            }
            copied = copied.saturating_add(count);
        }
        if copied != size {
            return Err(Refused::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        if sparse {
            file.set_len(size)?;
        }
        Ok(())
    }

    fn device<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        place: &Place,
        kind: FileType,
    ) -> Result<(), Refused> {
        let number = |n: io::Result<Option<u32>>| match n {
            Ok(Some(n)) => Ok(n),
            _ => Err(Refused::Hostile("device without a number")),
        };
        let major = number(entry.header().device_major())?;
        let minor = number(entry.header().device_minor())?;
        self.node(place, kind, rustix::fs::makedev(major, minor))
    }

    fn node(&self, place: &Place, kind: FileType, device: u64) -> Result<(), Refused> {
        if !self.privileged && kind != FileType::Fifo {
            tracing::debug!(path = %place.real().display(), "device node left out: not root");
            // A placeholder, so that metadata and later entries behave the same.
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&place.parent.fd, &place.name, flags, Mode::empty())?;
            return Ok(());
        }
        let mode = Mode::from_raw_mode(0o600);
        Ok(rustix::fs::mknodat(
            &place.parent.fd,
            &place.name,
            kind,
            mode,
            device,
        )?)
    }

    /// Owner first: changing it clears set-uid bits and file capabilities.
    fn set_metadata<R: Read>(
        &self,
        entry: &mut tar::Entry<'_, R>,
        place: &Place,
        state: &mut LayerState,
    ) -> Result<(), Refused> {
        let (fd, name) = (&place.parent.fd, place.name.as_os_str());
        let kind = entry.header().entry_type();
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        if self.privileged {
            let uid = Uid::from_raw(owner(entry.header().uid())?);
            let gid = Gid::from_raw(owner(entry.header().gid())?);
            rustix::fs::chownat(fd, name, Some(uid), Some(gid), nofollow)?;
        }
        let mut mtime = Timespec {
            tv_sec: entry
                .header()
                .mtime()
                .ok()
                .and_then(|secs| i64::try_from(secs).ok())
                .unwrap_or(0),
            tv_nsec: 0,
        };
        if let Some(extensions) = entry.pax_extensions().map_err(Refused::Read)? {
            for extension in extensions {
                let extension = extension.map_err(Refused::Read)?;
                let Ok(key) = extension.key() else { continue };
                if key == "mtime" {
                    mtime = extension.value().ok().and_then(pax_time).unwrap_or(mtime);
                } else if let Some(xattr) = key.strip_prefix(XATTR_PREFIX) {
                    set_xattr(place, xattr, extension.value_bytes())?;
                }
            }
        }
        if !kind.is_symlink() {
            let mode = entry.header().mode().map_err(Refused::Read)? & 0o7777;
            rustix::fs::chmodat(fd, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        let times = Timestamps {
            last_access: mtime,
            last_modification: mtime,
        };
        if kind.is_dir() {
            state.folder_times.push((place.real(), times));
        } else {
            rustix::fs::utimensat(fd, name, &times, nofollow)?;
        }
        Ok(())
    }

    /// Times are not worth failing for; a folder may be gone by now.
    fn set_folder_times(&self, state: &LayerState) {
        for (path, times) in &state.folder_times {
            if let Ok(folder) = self.root.folder(path) {
                let _ = rustix::fs::utimensat(&folder.fd, ".", times, AtFlags::empty());
            }
        }
    }
}

impl Refused {
    fn into_error(self, layer: &str, entry: String) -> ImageError {
        let layer = layer.to_owned();
        match self {
            Self::Hostile(why) => ImageError::Hostile { layer, entry, why },
            Self::Limit(what, limit) => ImageError::Limit { layer, what, limit },
            Self::Read(source) => ImageError::Layer { layer, source },
            Self::Write(source) => ImageError::Entry {
                layer,
                entry,
                source,
            },
        }
    }
}

/// The components of a path in a layer: relative to the root, nothing that climbs.
fn parts_of(path: &[u8]) -> Result<Vec<OsString>, Refused> {
    if path.len() > MAX_PATH_BYTES {
        return Err(Refused::Hostile("path too long"));
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(Refused::Hostile("path climbs with ..")),
            name => parts.push(OsString::from_vec(name.to_vec())),
        }
    }
    if parts.len() > MAX_DEPTH {
        return Err(Refused::Hostile("nested too deeply"));
    }
    Ok(parts)
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>) -> Result<Vec<u8>, Refused> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() => Ok(target.into_owned()),
        _ => Err(Refused::Hostile("link without a target")),
    }
}

/// A user or group id; the highest number means "unchanged" to the kernel.
fn owner(id: io::Result<u64>) -> Result<u32, Refused> {
    match id.map(u32::try_from) {
        Ok(Ok(id)) if id != u32::MAX => Ok(id),
        _ => Err(Refused::Hostile("owner out of range")),
    }
}

/// `seconds.fraction` of a pax header (POSIX pax, "mtime").
fn pax_time(text: &str) -> Option<Timespec> {
    let (secs, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let tv_sec = secs.parse().ok()?;
    let nanos: i64 = digits
        .parse()
        .ok()
        .filter(|n| (0..1_000_000_000).contains(n))?;
    // A negative time counts its fraction away from zero.
    Some(if secs.starts_with('-') && nanos > 0 {
        Timespec {
            tv_sec: i64::checked_sub(tv_sec, 1)?,
            tv_nsec: 1_000_000_000_i64.checked_sub(nanos)?,
        }
    } else {
        Timespec {
            tv_sec,
            tv_nsec: nanos,
        }
    })
}

/// Attributes that mean something inside the container. `trusted.*` and `user.overlay.*`
/// would steer the host's overlay mount and are left out.
fn set_xattr(place: &Place, name: &str, value: &[u8]) -> Result<(), Refused> {
    let wanted = name == "security.capability"
        || name.starts_with("system.posix_acl_")
        || (name.starts_with("user.") && !name.starts_with("user.overlay."));
    if !wanted {
        return Ok(());
    }
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", place.parent.fd.as_raw_fd()));
    path.push(&place.name);
    match rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty()) {
        Ok(()) => Ok(()),
        // The cache's file system has none, or this user may not.
        Err(Errno::OPNOTSUPP | Errno::PERM) => {
            tracing::debug!(path = %place.real().display(), name, "attribute left out");
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
