//! Disks that the host plugs into the running machine.
//!
//! A disk in a virtio-mmio slot is there once the driver is bound to the slot, which is done
//! when the bind returns. A disk of another bus announces itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::rpc::{Disk, DiskReply};

use crate::error::AgentError;
use crate::uevents;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";
const DISKS: &str = "/sys/block";

/// Finds a disk and says what its device is.
pub async fn attach(disk: &Disk) -> Result<DiskReply, AgentError> {
    let folder = match disk.mmio_device {
        Some(number) => bind_slot(number)?,
        None => wait_for(&disk.serial).await?,
    };
    describe(&folder)
}

/// Lets go of a disk that the host is about to unplug; idempotent.
pub fn detach(disk: &Disk) -> Result<(), AgentError> {
    let Some(number) = disk.mmio_device else {
        // It goes by itself.
        return Ok(());
    };
    let Some(device) = slot(number) else {
        return Ok(());
    };
    match tell_driver("unbind", &device) {
        // Not bound.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.map_err(AgentError::io(format!("letting go of {device}"))),
    }
}

/// Names of the machine's virtio-mmio device `number`: as the kernel's command line makes
/// them, and as ACPI does.
fn slot(number: u32) -> Option<String> {
    [
        format!("virtio-mmio.{number}"),
        format!("LNRO0005:{number:02x}"),
    ]
    .into_iter()
    .find(|name| Path::new(DEVICES).join(name).exists())
}

fn bind_slot(number: u32) -> Result<PathBuf, AgentError> {
    let device = slot(number)
        .ok_or_else(|| AgentError::invalid("mmio_device", format!("there is no {number}")))?;
    match tell_driver("bind", &device) {
        // Bound already.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        other => other.map_err(AgentError::io(format!("taking hold of {device}")))?,
    }
    let found = only_entry(&Path::new(DEVICES).join(&device), |n| {
        n.strip_prefix("virtio")
            .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
    })
    .and_then(|virtio| only_entry(&virtio.join("block"), |_| true));
    found.ok_or_else(|| {
        // For another try.
        let _ = tell_driver("unbind", &device);
        AgentError::invalid("mmio_device", format!("there is no disk in {device}"))
    })
}

fn tell_driver(what: &str, device: &str) -> io::Result<()> {
    fs::write(Path::new(DRIVER).join(what), device)
}

fn only_entry(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
}

/// What the host has to know of the disk with this folder in sysfs.
fn describe(folder: &Path) -> Result<DiskReply, AgentError> {
    let read = |file: &str| {
        let path = folder.join(file);
        fs::read_to_string(&path).map_err(AgentError::io(path.display().to_string()))
    };
    let number = read("dev")?;
    let (major, minor) = number
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| AgentError::Internal(format!("{number:?} is no device number")))?;
    let sectors: u64 = read("size")?.trim().parse().unwrap_or(0);
    let name = folder.file_name().unwrap_or_default();
    Ok(DiskReply {
        path: Path::new("/dev").join(name).display().to_string(),
        major,
        minor,
        bytes: sectors.saturating_mul(512),
        ..Default::default()
    })
}

/// Waits until a disk of this serial number is there.
async fn wait_for(serial: &str) -> Result<PathBuf, AgentError> {
    if serial.is_empty() {
        return Err(AgentError::invalid("serial", "is empty"));
    }
    uevents::until("block", "the appearance of the disk", || find(serial)).await
}

fn find(serial: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(DISKS).ok()?;
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|folder| {
            let found = fs::read_to_string(folder.join("serial"));
            found.is_ok_and(|found| found.trim_end() == serial)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_described_by_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vdb");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("dev"), "254:16\n").unwrap();
        fs::write(folder.join("size"), "8\n").unwrap();
        let disk = describe(&folder).unwrap();
        assert_eq!(disk.path, "/dev/vdb");
        assert_eq!((disk.major, disk.minor, disk.bytes), (254, 16, 4096));
        fs::write(folder.join("dev"), "254").unwrap();
        describe(&folder).unwrap_err();
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let missing = Disk {
            mmio_device: Some(4000),
            ..Default::default()
        };
        bind_slot(4000).unwrap_err();
        detach(&missing).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_disk_ends() {
        let wanted = Disk {
            serial: "there is no such disk".to_owned(),
            ..Default::default()
        };
        match attach(&wanted).await {
            Err(AgentError::Deadline(_)) => {}
            Err(AgentError::Io { source, .. }) => println!("skipped: {source}"),
            other => panic!("{other:?}"),
        }
    }
}
