//! Disk images and block devices for containers: `--disk`, and `--rootfs` with a file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

use super::values::container_path;

/// `--disk PATH[:GUEST_PATH][:ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskArg {
    /// Absolute path on the host.
    source: PathBuf,
    /// Absolute path in the container.
    destination: PathBuf,
    read_only: bool,
    /// The file system to be mounted; without one the container gets a device.
    fstype: Option<&'static str>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, destination, read_only) = match parts.as_slice() {
            [source] => (source, None, false),
            [source, "ro"] => (source, None, true),
            [source, destination] => (source, Some(*destination), false),
            [source, destination, "ro"] => (source, Some(*destination), true),
            [_, _, other] => return Err(format!("{other:?} is not ro")),
            _ => return Err("must be PATH, PATH:GUEST_PATH or PATH:GUEST_PATH:ro".to_owned()),
        };
        let source = fs::canonicalize(source).map_err(|e| format!("{source}: {e}"))?;
        let name = source.file_name().unwrap_or_default();
        let as_device = destination.is_some_and(|path| path.starts_with("/dev/"));
        let fstype = if as_device {
            None
        } else {
            file_system(&source)?
        };
        let destination = match (destination, fstype) {
            (Some(path), _) => container_path(path)?,
            (None, Some(_)) => Path::new("/mnt").join(name),
            (None, None) => Path::new("/dev").join(name),
        };
        if fstype.is_none() && !destination.starts_with("/dev") {
            return Err(format!(
                "{} has no file system that a guest can mount: to use it as a device give a \
                 path below /dev",
                source.display()
            ));
        }
        Ok(Self {
            source,
            destination,
            read_only,
            fstype,
        })
    }
}

impl DiskArg {
    pub(super) fn destination(&self) -> &Path {
        &self.destination
    }

    /// The mount in the OCI spec. The type `block` makes it a device.
    pub(super) fn to_mount(&self) -> Value {
        json!({
            "destination": self.destination,
            "type": self.fstype.unwrap_or("block"),
            "source": self.source,
            "options": [if self.read_only { "ro" } else { "rw" }],
        })
    }
}

/// Where a file system has its magic number.
const MAGICS: [(&str, u64, &[u8]); 3] = [
    ("ext4", 1080, &[0x53, 0xef]),
    ("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("squashfs", 0, b"hsqs"),
];

/// The file system on a disk, of those that guests can mount.
pub(super) fn file_system(disk: &Path) -> Result<Option<&'static str>, String> {
    let unreadable = |e: std::io::Error| format!("{}: {e}", disk.display());
    if fs::metadata(disk).map_err(unreadable)?.is_dir() {
        return Err(format!("{} is a folder, not a disk", disk.display()));
    }
    let file = File::open(disk).map_err(unreadable)?;
    for (fstype, offset, magic) in MAGICS {
        let mut found = vec![0; magic.len()];
        // A disk that is shorter does not have it.
        if file.read_exact_at(&mut found, offset).is_ok() && found == magic {
            return Ok(Some(fstype));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_disk_decides_what_becomes_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let disk = |name: &str, offset: usize, magic: &[u8]| {
            let mut bytes = vec![0; 4096];
            bytes[offset..offset + magic.len()].copy_from_slice(magic);
            let path = dir.join(name);
            fs::write(&path, bytes).unwrap();
            path.display().to_string()
        };
        let ext4 = disk("data", 1080, &[0x53, 0xef]);
        let plain = disk("plain", 0, &[]);
        let mount = |text: String| text.parse::<DiskArg>().map(|disk| disk.to_mount());

        let expected = json!({
            "destination": "/mnt/data", "type": "ext4", "source": ext4, "options": ["rw"],
        });
        assert_eq!(mount(ext4.clone()).unwrap(), expected);
        let expected = json!({
            "destination": "/srv", "type": "ext4", "source": ext4, "options": ["ro"],
        });
        assert_eq!(mount(format!("{ext4}:/srv:ro")).unwrap(), expected);
        let expected = json!({
            "destination": "/dev/disk", "type": "block", "source": ext4, "options": ["rw"],
        });
        assert_eq!(mount(format!("{ext4}:/dev/disk")).unwrap(), expected);
        let expected = json!({
            "destination": "/dev/plain", "type": "block", "source": plain, "options": ["ro"],
        });
        assert_eq!(mount(format!("{plain}:ro")).unwrap(), expected);

        let bad = [
            (format!("{plain}:/srv"), "no file system"),
            (format!("{ext4}:srv"), "absolute"),
            (format!("{ext4}:/srv:rw:x"), "must be"),
            (format!("{ext4}:/srv:x"), "not ro"),
            (dir.display().to_string(), "folder"),
            (format!("{ext4}.gone"), "No such file"),
        ];
        for (text, expected) in bad {
            let err = mount(text.clone()).unwrap_err();
            assert!(err.contains(expected), "{text}: {err}");
        }
        let squashfs = disk("squashfs", 0, b"hsqs");
        assert_eq!(file_system(Path::new(&squashfs)), Ok(Some("squashfs")));
        let erofs = disk("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(file_system(Path::new(&erofs)), Ok(Some("erofs")));
    }
}
