//! Block devices.

use std::fs;
use std::path::Path;
use std::process::Command;

use harness::cri::v1;
use harness::disk::{ext4, tools_missing};
use harness::kubelet::bind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Outcome, Skipped, Suite, skip};

/// More often than a pod has slots for disks.
const TIMES: u32 = 10;

/// A loop device of the host on an image; let go of on drop.
struct Loop(String);

impl Loop {
    fn on(image: &str) -> Result<Self, Skipped> {
        let tried = Command::new("losetup")
            .args(["--find", "--show", image])
            .output();
        match tried {
            Ok(out) if out.status.success() => {
                Ok(Self(String::from_utf8_lossy(&out.stdout).trim().to_owned()))
            }
            Ok(out) => Err(Skipped(format!(
                "no loop device: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            ))),
            Err(e) => Err(Skipped(format!("losetup cannot be run: {e}"))),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").args(["--detach", &self.0]).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} remains", self.0);
        }
    }
}

fn device(suite: &Suite, folder: &Path) -> Result<Loop, Skipped> {
    suite.with_node(|_| ())?;
    if let Some(why) = tools_missing() {
        return Err(Skipped(why));
    }
    Loop::on(&ext4(&folder.join("image"), 16, None))
}

/// As the kubelet gives a volume of mode `Filesystem`: mounted on the host.
pub(super) fn volume(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let device = device(suite, &folder)?;
    let point = folder.join("mounted");
    fs::create_dir(&point).unwrap();
    let flags = MsFlags::empty();
    let mounted = mount(
        Some(device.0.as_str()),
        &point,
        Some("ext4"),
        flags,
        None::<&str>,
    );
    if let Err(e) = mounted {
        return skip(format!("the host mounts no ext4: {e}"));
    }
    let mut config = suite.container(
        "claim",
        "echo kept > /data/file; sync; stat -f -c '%b %S' /data",
    );
    config.mounts.push(bind(&point, "/data"));
    let space = suite.output_of(config);
    let read = fs::read_to_string(point.join("file"));
    umount2(&point, MntFlags::empty()).expect("nothing holds the volume");
    assert_eq!(read.unwrap(), "kept\n");
    // The volume's size, not that of the disk below.
    let (blocks, size) = space.trim().split_once(' ').unwrap();
    let bytes = blocks.parse::<u64>().unwrap() * size.parse::<u64>().unwrap();
    assert!((8 << 20..=16 << 20).contains(&bytes), "{bytes}");
    Ok(())
}

/// As the kubelet gives a volume of mode `Block`: a device of the container.
pub(super) fn raw(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let device = device(suite, &folder)?;
    let given = |permissions: &str| v1::Device {
        container_path: "/dev/xvda".to_owned(),
        host_path: device.0.clone(),
        permissions: permissions.to_owned(),
    };
    let script =
        "test -b /dev/xvda && printf first | dd of=/dev/xvda conv=notrunc 2>/dev/null && sync";
    let mut config = suite.container("block", script);
    config.devices.push(given("rwm"));
    match suite.pod().try_run(config) {
        Ok(id) => {
            let kubelet = &suite.kubelet;
            assert_eq!(kubelet.exited(&id).exit_code, 0);
            kubelet.remove_container(&id);
        }
        Err(why) if why.message().contains("the 0 of this sandbox") => {
            return skip("VMs of this backend have no slots for disks: refused clearly");
        }
        Err(why) => panic!("{why}"),
    }
    let image = fs::read(folder.join("image")).unwrap();
    assert_eq!(&image[..5], b"first");
    for _ in 0..TIMES {
        let mut config = suite.container(
            "block",
            "head -c 5 /dev/xvda; echo x 2>/dev/null > /dev/xvda && echo written; true",
        );
        config.devices.push(given("r"));
        assert_eq!(suite.output_of(config), "first");
    }
    Ok(())
}

/// A device that a device plugin describes. Disks reach the guest; all else, of which VFIO is
/// a part, is refused by name.
pub(super) fn devices(suite: &Suite) -> Outcome {
    let device = device(suite, &suite.folder())?;
    let kind = "kuasar.test/disk";
    let wanted = |name: &str, node: &str, script: &str| {
        suite.with_node(|own| own.containerd.describe_device(kind, name, node))?;
        let mut config = suite.container(name, script);
        config.cdi_devices.push(v1::CdiDevice {
            name: format!("{kind}={name}"),
        });
        Ok::<_, Skipped>(config)
    };
    let other = "/dev/net/tun";
    let config = wanted("other", other, "true")?;
    let why = suite.pod().try_run(config).unwrap_err();
    assert!(why.message().contains(other), "{why}");
    // The magic number of ext4 (its superblock's s_magic).
    let script = format!(
        "echo $KUASAR_CDI; dd if={} bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1",
        device.0
    );
    let out = suite.output_of(wanted("disk", &device.0, &script)?);
    assert_eq!(out, "disk\n 53 ef\n");
    Ok(())
}
