//! The block devices of a spec: each becomes a disk of the guest. Other devices of the host
//! cannot be the guest's.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use agent_api::rpc::DiskReply;
use serde_json::{Map, Value, json};

use super::super::disks::plan::{self, DiskUse, WantedDisk};
use super::Guest;
use crate::pod::error::{PodError, Result};

/// Permissions of a device that comes as a mount.
const MODE: u32 = 0o660;

/// Devices that every container has anyway.
const COMMON_DEVICES: [&str; 9] = [
    "/dev/console",
    "/dev/full",
    "/dev/null",
    "/dev/ptmx",
    "/dev/pts/ptmx",
    "/dev/random",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];

/// Keeps the block devices that the container was given, and returns the disks for them.
///
/// A container that may use all devices has all of the host's in its spec: those are not meant
/// for a guest. What is meant has a rule of its own.
///
/// # Errors
/// A device that is meant cannot be had in a guest.
pub(super) fn rewrite(
    linux: &mut Map<String, Value>,
    guest: &Guest<'_>,
) -> Result<Vec<WantedDisk>> {
    let rules = rules(linux);
    let Some(Value::Array(devices)) = linux.remove("devices") else {
        return Ok(Vec::new());
    };
    let mut disks = Vec::new();
    let mut kept = Vec::new();
    for device in devices {
        let path = device.get("path").and_then(Value::as_str).unwrap_or("");
        let number = block_number(&device);
        let rule = number.and_then(|number| rules.iter().find(|rule| rule.number == number));
        let node = number.and_then(plan::block_node);
        if let (Some(rule), Some(source)) = (rule, node) {
            disks.push(WantedDisk {
                source,
                read_only: !rule.write,
                usage: DiskUse::Device(path.to_owned()),
            });
            kept.push(device);
        } else if !guest.privileged && !COMMON_DEVICES.contains(&path) {
            return Err(PodError::invalid(
                "linux.devices",
                path,
                "is not a block device of this host with a rule of its own, and no other can be \
                 used in a guest: remove it, or use a runtime class without VM for this pod",
            ));
        }
    }
    if !kept.is_empty() {
        linux.insert("devices".to_owned(), Value::Array(kept));
    }
    Ok(disks)
}

/// A rule that allows one block device.
struct Rule {
    number: (u64, u64),
    write: bool,
}

fn rules(linux: &Map<String, Value>) -> Vec<Rule> {
    let rules = linux
        .get("resources")
        .and_then(|resources| resources.get("devices"))
        .and_then(Value::as_array);
    let allows = |rule: &Value| {
        let allow = rule.get("allow").and_then(Value::as_bool) == Some(true);
        let access = rule.get("access").and_then(Value::as_str).unwrap_or("rwm");
        Some(Rule {
            number: block_number(rule).filter(|_| allow)?,
            write: access.contains('w'),
        })
    };
    rules.into_iter().flatten().filter_map(allows).collect()
}

fn block_number(device: &Value) -> Option<(u64, u64)> {
    let number = |key| device.get(key).and_then(Value::as_u64);
    let block = device.get("type").and_then(Value::as_str) == Some("b");
    Some((number("major")?, number("minor")?)).filter(|_| block)
}

/// Makes a mount of a block device a device, and returns the disk for it.
pub(super) fn from_mount(
    spec: &mut Map<String, Value>,
    source: &Path,
    destination: &str,
    read_only: bool,
) -> WantedDisk {
    let linux = spec.entry("linux").or_insert_with(|| json!({}));
    if let Some(linux) = linux.as_object_mut() {
        let devices = linux.entry("devices").or_insert_with(|| json!([]));
        if let Some(devices) = devices.as_array_mut() {
            devices.push(json!({
                "path": destination, "type": "b", "major": 0, "minor": 0, "fileMode": MODE,
            }));
        }
    }
    WantedDisk {
        source: source.to_owned(),
        read_only,
        usage: DiskUse::Device(destination.to_owned()),
    }
}

/// Whether `source` is a block device.
pub(super) fn is_block(source: &Path) -> bool {
    std::fs::metadata(source).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Gives the devices in `spec` the numbers that they have in the guest.
pub(crate) fn set_numbers(spec: &mut Value, found: &[(String, DiskReply)]) {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return;
    };
    // Of the host and of the guest.
    let mut numbers = Vec::new();
    let devices = linux.get_mut("devices").and_then(Value::as_array_mut);
    for device in devices.into_iter().flatten() {
        let path = device.get("path").and_then(Value::as_str);
        let Some((_, disk)) = found.iter().find(|(of, _)| Some(of.as_str()) == path) else {
            continue;
        };
        let new = (u64::from(disk.major), u64::from(disk.minor));
        numbers.extend(block_number(device).map(|old| (old, new)));
        set_number(device, new);
    }
    let rules = linux
        .get_mut("resources")
        .and_then(|resources| resources.get_mut("devices"))
        .and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten() {
        let old = block_number(rule);
        if let Some((_, new)) = numbers.iter().find(|(of, _)| Some(*of) == old) {
            set_number(rule, *new);
        }
    }
}

fn set_number(entry: &mut Value, (major, minor): (u64, u64)) {
    if let Some(entry) = entry.as_object_mut() {
        entry.insert("major".to_owned(), json!(major));
        entry.insert("minor".to_owned(), json!(minor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block device of this host, as number and node.
    fn some_device() -> Option<((u64, u64), std::path::PathBuf)> {
        let entries = std::fs::read_dir("/sys/dev/block").ok()?;
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| {
                let (major, minor) = name.split_once(':')?;
                Some((major.parse().ok()?, minor.parse().ok()?))
            })
            .find_map(|number| Some((number, plan::block_node(number)?)))
    }

    #[test]
    fn what_the_container_was_given_becomes_disks() {
        let Some(((major, minor), node)) = some_device() else {
            return println!("skipped: no block device has a node here");
        };
        let device = |path: &str, kind: &str, major: u64, minor: u64| json!({"path": path, "type": kind, "major": major, "minor": minor});
        let guest = |privileged| Guest {
            container: "c",
            files: &[],
            pod_pid: 77,
            pids: &[],
            privileged,
        };
        let spec = |rule: Value| {
            json!({"linux": {
                "devices": [
                    device("/dev/null", "c", 1, 3),
                    device("/dev/data", "b", major, minor),
                ],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 4000, "minor": 1, "access": "rwm"},
                    rule,
                ]},
            }})
        };
        let rule = json!({
            "allow": true, "type": "b", "major": major, "minor": minor, "access": "r",
        });
        let mut given = spec(rule);
        let linux = given["linux"].as_object_mut().unwrap();
        let disks = rewrite(linux, &guest(false)).unwrap();
        let expected = WantedDisk {
            source: node,
            read_only: true,
            usage: DiskUse::Device("/dev/data".to_owned()),
        };
        assert_eq!(disks, [expected]);
        let reply = DiskReply {
            major: 254,
            minor: 16,
            ..Default::default()
        };
        set_numbers(&mut given, &[("/dev/data".to_owned(), reply)]);
        assert_eq!(
            given["linux"]["devices"],
            json!([device("/dev/data", "b", 254, 16)])
        );
        let rules = &given["linux"]["resources"]["devices"];
        assert_eq!(rules[2]["major"], 254);
        assert_eq!(rules[2]["minor"], 16);
        assert_eq!(rules[1]["major"], 4000);

        // A privileged container: all devices, none of them meant.
        let mut all = spec(json!({"allow": true, "access": "rwm"}));
        let linux = all["linux"].as_object_mut().unwrap();
        assert_eq!(rewrite(&mut linux.clone(), &guest(true)).unwrap(), []);
        let error = rewrite(linux, &guest(false)).unwrap_err().to_string();
        assert!(error.contains("/dev/data"), "{error}");
    }
}
