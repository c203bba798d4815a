//! Which disks a container needs, and what the guest makes of them.
//!
//! Block devices and images of the host are not mounted there: the guest gets them as disks and
//! mounts them itself, without a copy and without the share in between.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_api::rpc;
use nix::sys::stat::{major, minor};

use super::super::error::{PodError, Result};
use super::super::storage::{ROOTFS, RootfsMount};

/// What the guest's kernel can mount from a disk. Others are the host's to mount.
const GUEST_FILE_SYSTEMS: [&str; 5] = ["ext4", "ext3", "ext2", "erofs", "squashfs"];

/// File systems that cannot be written to.
const READ_ONLY: [&str; 2] = ["erofs", "squashfs"];

/// Types under which containerd's mount manager leaves an overlay to the runtime: names of
/// other mounts of the list in its options, and folders to be made.
const TEMPLATES: [&str; 2] = ["format/overlay", "format/mkdir/overlay"];

/// A disk that a container needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedDisk {
    /// Block device or image on the host.
    pub(crate) source: PathBuf,
    /// Whether the guest cannot write to it.
    pub(crate) read_only: bool,
    /// What becomes of it in the guest.
    pub(crate) usage: DiskUse,
}

/// What becomes of a disk in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DiskUse {
    /// Mounted before the container is created.
    Mount {
        /// Where.
        target: String,
        /// File system.
        fstype: String,
        /// As for `mount(8)`.
        options: Vec<String>,
    },
    /// A device of the container at this path.
    Device(String),
}

/// A root file system: what the host mounts, or what the guest does.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RootPlan {
    /// Mounted on the host, under the share.
    pub(crate) host: Vec<RootfsMount>,
    /// Mounted in the guest, in this order.
    pub(crate) disks: Vec<WantedDisk>,
    /// Mounted in the guest on top of them.
    pub(crate) overlay: Option<rpc::Mount>,
    /// Where the guest has it, if not in the share.
    pub(crate) path: Option<String>,
}

/// Where the guest mounts the disk `name` of a container.
pub(crate) fn mount_point(container: &str, name: &str) -> String {
    format!("{}/{container}/disks/{name}", agent_api::CONTAINERS_DIR)
}

/// Decides who mounts what of a root file system. Blocks.
///
/// # Errors
/// A source that is missing or cannot be a disk, or an overlay that only the host can mount of
/// layers that only the guest can.
pub(crate) fn root(container: &str, rootfs: Vec<RootfsMount>) -> Result<RootPlan> {
    let is_disk = |layer: &RootfsMount| is_disk(&layer.fstype, Path::new(&layer.source));
    let template = |layer: &RootfsMount| TEMPLATES.contains(&layer.fstype.as_str());
    if !rootfs.iter().any(|layer| is_disk(layer) || template(layer)) {
        return Ok(RootPlan {
            host: rootfs,
            ..RootPlan::default()
        });
    }
    let mut rootfs = rootfs;
    let overlay = rootfs.pop_if(|last| template(last) || last.fstype == "overlay");
    let alone = overlay.is_none();
    if alone && rootfs.len() > 1 {
        return Err(unsupported(&rootfs, "several disks and no overlay of them"));
    }
    // Without a place to write, nothing could be mounted on a path that the image lacks.
    let alone = alone
        && !rootfs
            .iter()
            .any(|layer| read_only(&layer.fstype, &layer.options));
    let mut plan = RootPlan::default();
    let mut points = Vec::new();
    for (index, layer) in rootfs.iter().enumerate() {
        if !is_disk(layer) || !layer.target.is_empty() && layer.target != "/" {
            return Err(unsupported(&rootfs, "disks between other mounts"));
        }
        let name = if alone {
            ROOTFS.to_owned()
        } else {
            format!("layer{index}")
        };
        let target = mount_point(container, &name);
        points.push(target.clone());
        plan.disks.push(mounted(layer, target));
    }
    let path = mount_point(container, ROOTFS);
    plan.overlay = match overlay {
        Some(overlay) => Some(overlay_in_guest(&overlay, &points, &path)?),
        None if alone => None,
        None => Some(layer_in_memory(container, &points, &path)),
    };
    plan.path = Some(path);
    Ok(plan)
}

fn unsupported(layers: &[RootfsMount], what: &str) -> PodError {
    let types: Vec<_> = layers.iter().map(|layer| layer.fstype.as_str()).collect();
    PodError::Unsupported(format!(
        "a rootfs of {what} ({}): use one disk, or disks and an overlay of them",
        types.join(", ")
    ))
}

/// Whether the guest can have this as a disk and mount it.
pub(crate) fn is_disk(fstype: &str, source: &Path) -> bool {
    GUEST_FILE_SYSTEMS.contains(&fstype)
        && std::fs::metadata(source)
            .is_ok_and(|meta| meta.is_file() || meta.file_type().is_block_device())
}

fn mounted(layer: &RootfsMount, target: String) -> WantedDisk {
    volume(
        Path::new(&layer.source),
        &layer.fstype,
        &layer.options,
        target,
    )
}

fn read_only(fstype: &str, options: &[String]) -> bool {
    READ_ONLY.contains(&fstype) || options.iter().any(|o| o == "ro" || o == "rro")
}

/// A disk with a file system that the guest mounts at `target`.
pub(crate) fn volume(
    source: &Path,
    fstype: &str,
    options: &[String],
    target: String,
) -> WantedDisk {
    let read_only = read_only(fstype, options);
    let mut options: Vec<String> = options
        .iter()
        // How a host gets at an image, and what concerns the host's mounts.
        .filter(|o| !matches!(o.as_str(), "loop" | "ro" | "rro" | "rw"))
        .filter(|o| !o.ends_with("private") && !o.ends_with("slave") && !o.ends_with("shared"))
        .cloned()
        .collect();
    if read_only {
        options.push("ro".to_owned());
    }
    WantedDisk {
        source: source.to_owned(),
        read_only,
        usage: DiskUse::Mount {
            target,
            fstype: fstype.to_owned(),
            options,
        },
    }
}

/// An overlay whose writable layer is in the guest's memory and goes with the container.
fn layer_in_memory(container: &str, points: &[String], target: &str) -> rpc::Mount {
    rpc::Mount {
        source: "overlay".to_owned(),
        target: target.to_owned(),
        fstype: "overlay".to_owned(),
        options: vec![
            format!("lowerdir={}", points.join(":")),
            format!("upperdir={}", mount_point(container, "upper")),
            format!("workdir={}", mount_point(container, "work")),
        ],
        ..Default::default()
    }
}

/// The overlay with the guest's mount points in place of containerd's expressions.
fn overlay_in_guest(overlay: &RootfsMount, points: &[String], target: &str) -> Result<rpc::Mount> {
    let mut options = Vec::new();
    for option in &overlay.options {
        // The agent makes the folders of an overlay.
        if option.starts_with("X-containerd.mkdir.path=") {
            continue;
        }
        let option = expand(option, points)?;
        let folders = ["lowerdir=", "upperdir=", "workdir="];
        if let Some(path) = folders.iter().find_map(|key| option.strip_prefix(key)) {
            let within = |path: &str| {
                points.iter().any(|point| {
                    path.strip_prefix(point.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                })
            };
            if !path.split(':').all(within) {
                return Err(PodError::Unsupported(format!(
                    "an overlay of disks with a folder of the host ({option}): let the \
                     snapshotter make the writable layer an image too (erofs: default_size)"
                )));
            }
        }
        options.push(option);
    }
    Ok(rpc::Mount {
        source: "overlay".to_owned(),
        target: target.to_owned(),
        fstype: "overlay".to_owned(),
        options,
        ..Default::default()
    })
}

/// Expands `{{ mount N }}` to a mount point, and `{{ overlay A B }}` to those from A to B,
/// separated by colons.
fn expand(option: &str, points: &[String]) -> Result<String> {
    let invalid = || {
        PodError::invalid(
            "rootfs.options",
            option,
            "must name mounts of the list as {{ mount N }} or {{ overlay A B }}",
        )
    };
    let point = |index: &str| -> Result<(usize, &String)> {
        let index = index.parse().map_err(|_| invalid())?;
        let found = points.get(index).ok_or_else(invalid)?;
        Ok((index, found))
    };
    let mut expanded = String::new();
    let mut rest = option;
    while let Some((before, after)) = rest.split_once("{{") {
        let (expression, behind) = after.split_once("}}").ok_or_else(invalid)?;
        expanded.push_str(before);
        match *expression.split_whitespace().collect::<Vec<_>>() {
            ["mount", index] => expanded.push_str(point(index)?.1),
            ["overlay", first, last] => {
                let (first, last) = (point(first)?.0, point(last)?.0);
                let mut indices: Vec<_> = (first.min(last)..=first.max(last)).collect();
                if first > last {
                    indices.reverse();
                }
                let picked: Vec<_> = indices
                    .into_iter()
                    .filter_map(|index| points.get(index))
                    .map(String::as_str)
                    .collect();
                expanded.push_str(&picked.join(":"));
            }
            _ => return Err(invalid()),
        }
        rest = behind;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// The host's node of block device `number`, if there is that device.
pub(crate) fn block_node(device: (u64, u64)) -> Option<PathBuf> {
    let (wanted_major, wanted_minor) = device;
    let uevent = format!("/sys/dev/block/{wanted_major}:{wanted_minor}/uevent");
    let uevent = std::fs::read_to_string(uevent).ok()?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let node = Path::new("/dev").join(name);
    let meta = std::fs::metadata(&node).ok()?;
    let number = meta.rdev();
    (meta.file_type().is_block_device() && (major(number), minor(number)) == device).then_some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(fstype: &str, source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fstype: fstype.to_owned(),
            source: source.display().to_string(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn image(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, [0; 512]).unwrap();
        path
    }

    #[test]
    fn folders_stay_with_the_host() {
        let binds = vec![layer("bind", Path::new("/tmp"), &["rbind"])];
        let plan = root("c", binds.clone()).unwrap();
        assert_eq!(plan.host, binds);
        assert_eq!(plan.path, None);
        // As does what the guest's kernel cannot mount.
        let dir = tempfile::tempdir().unwrap();
        let xfs = vec![layer("xfs", &image(&dir, "xfs"), &[])];
        assert_eq!(root("c", xfs.clone()).unwrap().host, xfs);
    }

    #[test]
    fn an_image_is_mounted_by_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let source = image(&dir, "disk");
        let plan = root("c", vec![layer("ext4", &source, &["loop", "noatime"])]).unwrap();
        let path = "/run/kuasar/containers/c/disks/rootfs";
        assert_eq!(plan.path.as_deref(), Some(path));
        let disk = WantedDisk {
            source,
            read_only: false,
            usage: DiskUse::Mount {
                target: path.to_owned(),
                fstype: "ext4".to_owned(),
                options: vec!["noatime".to_owned()],
            },
        };
        assert_eq!(plan.disks, [disk]);
        assert_eq!(plan.overlay, None);
        assert!(plan.host.is_empty());
    }

    #[test]
    fn an_image_that_cannot_be_written_to_gets_a_layer_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let source = image(&dir, "disk");
        for layer in [
            layer("erofs", &source, &["loop"]),
            layer("ext4", &source, &["ro"]),
        ] {
            let plan = root("c", vec![layer]).unwrap();
            assert!(plan.disks[0].read_only);
            let at = |name: &str| format!("/run/kuasar/containers/c/disks/{name}");
            assert_eq!(plan.path, Some(at("rootfs")));
            let overlay = plan.overlay.unwrap();
            assert_eq!(overlay.target, at("rootfs"));
            let options = [
                format!("lowerdir={}", at("layer0")),
                format!("upperdir={}", at("upper")),
                format!("workdir={}", at("work")),
            ];
            assert_eq!(overlay.options, options);
        }
    }

    #[test]
    fn layers_of_containerds_erofs_snapshotter_are_overlaid_by_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = vec![
            layer("ext4", &image(&dir, "rwlayer.img"), &["rw", "loop"]),
            layer("erofs", &image(&dir, "upper.erofs"), &["ro", "loop"]),
            layer("erofs", &image(&dir, "lower.erofs"), &["ro", "loop"]),
            layer(
                "format/mkdir/overlay",
                Path::new("overlay"),
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                ],
            ),
        ];
        let plan = root("c", rootfs.clone()).unwrap();
        let at = |name: &str| format!("/run/kuasar/containers/c/disks/{name}");
        let read_only: Vec<_> = plan.disks.iter().map(|disk| disk.read_only).collect();
        assert_eq!(read_only, [false, true, true]);
        let overlay = plan.overlay.unwrap();
        assert_eq!(overlay.target, at("rootfs"));
        let options = [
            format!("workdir={}/work", at("layer0")),
            format!("upperdir={}/upper", at("layer0")),
            format!("lowerdir={}:{}", at("layer1"), at("layer2")),
        ];
        assert_eq!(overlay.options, options);

        let bad = [
            ("lowerdir={{ overlay 1 3 }}", "must name mounts"),
            ("lowerdir={{ mount -1 }}", "must name mounts"),
            ("lowerdir={{ mount 1", "must name mounts"),
            ("upperdir=/var/lib/containerd/upper", "default_size"),
            ("upperdir={{ mount 0 }}x", "default_size"),
        ];
        for (option, expected) in bad {
            let mut rootfs = rootfs.clone();
            rootfs.last_mut().unwrap().options = vec![option.to_owned()];
            let err = root("c", rootfs).unwrap_err().to_string();
            assert!(err.contains(expected), "{option}: {err}");
        }
        let err = root("c", rootfs[..3].to_vec()).unwrap_err();
        assert!(err.to_string().contains("no overlay"), "{err}");
    }

    #[test]
    fn what_is_no_block_device_has_no_node() {
        // The number of /dev/null, of the wrong kind.
        assert_eq!(block_node((4095, 4095)), None);
    }
}
