//! StratoVirt's command line, strictly: an unknown option or property, a place that is taken,
//! a device without what is behind it are failures. It knows no more than what we use.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a command line sets up.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// Root ports, and the devices behind them.
    pub(super) ports: BTreeMap<String, Option<String>>,
    pub(super) netdevs: BTreeSet<String>,
    /// Everything that can be behind a device.
    backends: BTreeSet<String>,
    /// Devices of the board, by address where it has addresses.
    places: BTreeSet<String>,
    ids: BTreeSet<String>,
    pci: bool,
}

/// Properties of an option: those it must have, and those it may have.
type Known = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const OBJECTS: [Known; 5] = [
    ("chardev socket", &["id", "path"], &["server", "nowait"]),
    ("object rng-random", &["id", "filename"], &[]),
    ("netdev tap", &["id", "fds"], &[]),
    ("drive image", &["id", "file", "readonly", "direct"], &[]),
    ("drive firmware", &["file", "if", "unit", "readonly"], &[]),
];

/// Devices without `-pci` or `-device`, what of theirs names a backend, and the rest.
const DEVICES: [(&str, &str, &[&str]); 6] = [
    ("vhost-user-fs", "chardev", &["tag"]),
    ("vhost-vsock", "", &["guest-cid", "vhostfd"]),
    ("virtio-rng", "rng", &[]),
    (
        "virtio-balloon",
        "",
        &["free-page-reporting", "deflate-on-oom"],
    ),
    ("virtio-blk", "drive", &[]),
    ("virtio-net", "netdev", &["mac"]),
];

/// First part and properties of an option's value.
fn parts(value: &str) -> (&str, BTreeMap<&str, &str>) {
    let mut words = value.split(',').peekable();
    let first = words.next_if(|word| !word.contains('=')).unwrap_or("");
    let pairs = words.map(|word| word.split_once('=').unwrap_or((word, "")));
    (first, pairs.collect())
}

impl Devices {
    /// What `args` sets up.
    pub(super) fn of(args: &[String], inherited: &[i32]) -> Self {
        let mut devices = Self::default();
        let mut args = args.iter().map(String::as_str);
        let mut once = BTreeSet::new();
        while let Some(option) = args.next() {
            let option = option.strip_prefix('-').unwrap();
            let repeated = ["device", "chardev", "object", "netdev", "drive"].contains(&option);
            assert!(repeated || once.insert(option), "-{option} twice");
            if ["disable-seccomp", "mem-prealloc"].contains(&option) {
                continue;
            }
            let value = args.next().unwrap();
            devices.option(option, value, inherited);
        }
        for needed in ["machine", "qmp", "kernel", "append", "smp", "m"] {
            assert!(once.contains(needed), "no -{needed}");
        }
        devices
    }

    fn option(&mut self, option: &str, value: &str, inherited: &[i32]) {
        let (first, properties) = parts(value);
        match option {
            "name" | "append" | "initrd" | "mem-path" => {}
            "machine" => {
                self.pci = first == "q35";
                assert!(["q35", "microvm"].contains(&first), "{value}");
                assert_eq!(properties.get("mem-share"), Some(&"on"), "{value}");
            }
            "kernel" => match value.strip_prefix("/proc/self/fd/") {
                Some(fd) => assert!(inherited.contains(&fd.parse().unwrap())),
                None => assert!(Path::new(value).is_absolute()),
            },
            "smp" => assert_ne!(properties["cpus"].parse::<u8>().unwrap(), 0),
            "m" => {
                let size = properties["size"].strip_suffix('K').unwrap();
                assert!(size.parse::<u64>().unwrap() >= 128 << 10, "{value}");
            }
            "qmp" => {
                assert!(first.starts_with("unix:/"), "{value}");
                let words: Vec<_> = properties.keys().copied().collect();
                assert_eq!(words, ["nowait", "server"]);
            }
            "serial" => assert_eq!((first, properties.len()), ("file", 1)),
            "global" => assert_eq!(value, "pcie-root-port.fast-unplug=1"),
            "device" => self.device(first, &properties, inherited),
            "chardev" | "object" | "netdev" | "drive" => {
                let kind = match (option, properties.contains_key("if")) {
                    ("drive", true) => "firmware",
                    ("drive", false) => "image",
                    _ => first,
                };
                let name = format!("{option} {kind}");
                let known = OBJECTS.iter().find(|known| known.0 == name);
                let (_, must, may) = known.unwrap_or_else(|| panic!("{name}"));
                has(&properties, must, may);
                if let Some(id) = properties.get("id") {
                    assert!(self.backends.insert((*id).to_owned()), "{id} twice");
                }
                if option == "netdev" {
                    self.netdevs.insert(properties["id"].to_owned());
                    let fds = properties["fds"].split(':');
                    assert!(
                        fds.into_iter()
                            .all(|fd| inherited.contains(&fd.parse().unwrap()))
                    );
                }
            }
            other => panic!("there is no option -{other}"),
        }
    }

    fn device(&mut self, name: &str, properties: &BTreeMap<&str, &str>, inherited: &[i32]) {
        let id = properties["id"];
        assert!(self.ids.insert(id.to_owned()), "{id} twice");
        if name == "pcie-root-port" {
            assert!(self.pci);
            has(
                properties,
                &["id", "port", "bus", "addr", "multifunction"],
                &[],
            );
            let (slot, function) = properties["addr"].split_once('.').unwrap();
            assert!(number(slot) < 0x1f && number(function) < 8);
            assert!(self.places.insert(properties["addr"].to_owned()));
            self.ports.insert(id.to_owned(), None);
            return;
        }
        let (kind, pci) = match name.strip_suffix("-pci") {
            Some(kind) => (kind, true),
            None => (name.strip_suffix("-device").unwrap(), false),
        };
        assert_eq!(pci, self.pci, "{name}");
        let known = DEVICES.iter().find(|known| known.0 == kind);
        let (_, backend, rest) = known.unwrap_or_else(|| panic!("{name}"));
        let mut must = vec!["id"];
        must.extend(rest.iter().copied());
        must.extend((!backend.is_empty()).then_some(*backend));
        must.extend(pci.then_some(["bus", "addr"]).into_iter().flatten());
        has(properties, &must, if pci { &["mq"] } else { &[] });
        if let Some(backend) = properties.get(backend) {
            assert!(self.backends.remove(*backend), "{backend} is not there");
        }
        if let Some(fd) = properties.get("vhostfd") {
            assert!(inherited.contains(&fd.parse().unwrap()));
        }
        match properties.get("bus") {
            None => {}
            Some(&"pcie.0") => {
                assert!((1..0x10).contains(&number(properties["addr"])));
                assert!(self.places.insert(properties["addr"].to_owned()));
            }
            Some(port) => {
                let place = self.ports.get_mut(*port).unwrap();
                assert_eq!(place.replace(id.to_owned()), None, "{port}");
            }
        }
    }
}

fn number(hex: &str) -> u8 {
    u8::from_str_radix(hex.strip_prefix("0x").unwrap(), 16).unwrap()
}

fn has(properties: &BTreeMap<&str, &str>, must: &[&str], may: &[&str]) {
    for key in must {
        assert!(
            properties.contains_key(key),
            "{key} is missing: {properties:?}"
        );
    }
    for key in properties.keys() {
        assert!(
            must.contains(key) || may.contains(key),
            "there is no {key}: {properties:?}"
        );
    }
}
