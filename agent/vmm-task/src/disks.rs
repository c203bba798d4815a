//! Disks that the host plugs into the running machine.
//!
//! A disk in a virtio-mmio slot is there once the driver is bound to the slot, which is done
//! when the bind returns. A disk of another bus announces itself: the kernel's events are
//! subscribed to before the disks that are there are looked at, so none is missed.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc::{Disk, DiskReply};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::AgentError;
use crate::sys;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";
const DISKS: &str = "/sys/block";

/// The kernel's own events; 2 would be those that udev passes on.
const KERNEL_EVENTS: u32 = 1;
/// No event is longer (`UEVENT_BUFFER_SIZE` and its path).
const EVENT_BYTES: usize = 8192;
/// For a bus to find a disk that the host has plugged in.
const APPEARANCE: Duration = Duration::from_secs(30);

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
    let events = Events::subscribe().map_err(AgentError::io("listening for disks"))?;
    let search = async {
        loop {
            if let Some(folder) = find(serial) {
                return Ok(folder);
            }
            events
                .disk_event()
                .await
                .map_err(AgentError::io("listening for disks"))?;
        }
    };
    tokio::time::timeout(APPEARANCE, search)
        .await
        .unwrap_or(Err(AgentError::Deadline("the appearance of the disk")))
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

/// The kernel's device events (netlink, `NETLINK_KOBJECT_UEVENT`).
struct Events(AsyncFd<Arc<std::os::fd::OwnedFd>>);

impl Events {
    fn subscribe() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
        Ok(Self(sys::polled(Arc::new(socket), Interest::READABLE)?))
    }

    /// Waits for an event of a disk, or for the loss of events. Cancel safe.
    async fn disk_event(&self) -> io::Result<()> {
        let mut event = [0; EVENT_BYTES];
        loop {
            let mut ready = self.0.readable().await?;
            let received = recv(ready.get_inner().as_raw_fd(), &mut event, MsgFlags::empty());
            match received {
                Ok(bytes) if is_of_disk(event.get(..bytes).unwrap_or_default()) => return Ok(()),
                // More came than the socket holds.
                Err(Errno::ENOBUFS) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// `add@/devices/.../block/vda`, then `NAME=value`, each ended by a zero byte.
fn is_of_disk(event: &[u8]) -> bool {
    let mut parts = event.split(|byte| *byte == 0);
    let action = parts.next().unwrap_or_default();
    !action.starts_with(b"remove@") && parts.any(|part| part == b"SUBSYSTEM=block")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_disks_are_told_from_others() {
        let add = b"add@/devices/virtio0/block/vda\0ACTION=add\0SUBSYSTEM=block\0";
        assert!(is_of_disk(add));
        let gone = b"remove@/devices/virtio0/block/vda\0SUBSYSTEM=block\0";
        assert!(!is_of_disk(gone));
        assert!(!is_of_disk(b"add@/devices/eth0\0SUBSYSTEM=net\0"));
        assert!(!is_of_disk(b""));
    }

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
