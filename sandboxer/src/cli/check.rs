//! `kuasar-ctl check`: what this host can do, what is missing, and the fix.

use std::fs;
use std::path::Path;

use bytesize::ByteSize;
use serde::Serialize;
use vmm_core::host::Host;

use super::args::{CheckArgs, Global};
use super::client::Controller;
use super::error::{CliError, Result, chain};
use super::output::{self, BAD, GOOD, WARN};
use crate::config::Config;
use crate::image::ImageStore;

/// The first Linux with `openat2`.
const MIN_KERNEL: (u32, u32) = (5, 6);
/// A pod of the default size and the daemon.
const MIN_MEMORY: ByteSize = ByteSize::mib(192);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// No pod can run.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Item {
    name: &'static str,
    verdict: Verdict,
    found: String,
    fix: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether a pod can run.
    ok: bool,
    /// Unknown without KVM.
    emulated_ring0: Option<bool>,
    items: Vec<Item>,
}

impl Item {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Warn,
            fix: Some(fix.into()),
            ..Self::ok(name, found)
        }
    }

    fn missing(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Missing,
            ..Self::warn(name, found, fix)
        }
    }
}

/// Prints the report: whether a pod can run.
pub(super) async fn check(global: &Global, args: &CheckArgs) -> Result<bool> {
    let host = tokio::task::spawn_blocking(Host::probe)
        .await
        .map_err(|e| CliError::caused("cannot look at KVM", &e))?;
    let mut items = kvm(&host);
    items.extend([
        privileges(),
        kernel(&rustix::system::uname().release().to_string_lossy()),
        cgroups(Path::new("/sys/fs/cgroup")),
        memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        overlay(&fs::read_to_string("/proc/filesystems").unwrap_or_default()),
        vhost(),
        guest(),
        build_tools(),
        cache(),
        daemon(global).await,
    ]);
    let report = Report {
        ok: !items.iter().any(|i| i.verdict == Verdict::Missing),
        emulated_ring0: host.ok().map(|h| h.emulated_ring0()),
        items,
    };
    if args.json {
        output::json(&report)?;
    } else {
        show(&report)?;
    }
    Ok(report.ok)
}

fn show(report: &Report) -> Result<()> {
    for item in &report.items {
        let (style, word) = match item.verdict {
            Verdict::Ok => (GOOD, "ok"),
            Verdict::Warn => (WARN, "warn"),
            Verdict::Missing => (BAD, "missing"),
        };
        output::line(&format!(
            "{style}{word:<8}{style:#}{:<14}{}",
            item.name, item.found
        ))?;
        if let Some(fix) = &item.fix {
            output::line(&format!("{:22}try: {fix}", ""))?;
        }
    }
    output::line(if report.ok {
        "\nThis host can run pods."
    } else {
        "\nThis host cannot run pods yet."
    })
}

fn kvm(host: &std::result::Result<Host, vmm_core::host::HostError>) -> Vec<Item> {
    let host = match host {
        Ok(host) => host,
        Err(e) => return vec![Item::missing("kvm", chain(e), e.fix())],
    };
    let facts = host.facts();
    let found = format!(
        "/dev/kvm is usable, {} vCPUs and {} memory slots per VM",
        facts.max_vcpus, facts.memory_slots
    );
    let ring0 = if facts.emulated_ring0 {
        Item::warn(
            "guest kernel",
            "emulated instruction by instruction (no VT-x or AMD-V behind this KVM): a boot \
             takes about 20 s",
            "a host, or an instance type, with hardware virtualization; timeouts are stretched \
             meanwhile",
        )
    } else {
        Item::ok("guest kernel", "runs on the CPU")
    };
    vec![Item::ok("kvm", found), ring0]
}

fn privileges() -> Item {
    if rustix::process::geteuid().is_root() {
        return Item::ok("user", "root");
    }
    Item::missing(
        "user",
        "not root: container mounts cannot be made",
        "run kuasar-ctl and vmm-sandboxer as root",
    )
}

fn kernel(release: &str) -> Item {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    };
    if version >= MIN_KERNEL {
        return Item::ok("kernel", release);
    }
    Item::missing(
        "kernel",
        format!("{release} is too old"),
        format!("Linux {}.{} or newer", MIN_KERNEL.0, MIN_KERNEL.1),
    )
}

fn cgroups(root: &Path) -> Item {
    if root.join("cgroup.controllers").exists() {
        Item::ok("cgroups", "version 2")
    } else if root.join("unified/cgroup.controllers").exists() {
        Item::ok("cgroups", "hybrid (versions 1 and 2)")
    } else if root.join("memory").exists() {
        Item::ok("cgroups", "version 1")
    } else {
        Item::warn(
            "cgroups",
            format!("none at {}", root.display()),
            "mount -t cgroup2 none /sys/fs/cgroup; without it pods are not accounted on the host",
        )
    }
}

fn memory(meminfo: &str) -> Item {
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse().ok())
        .map_or(ByteSize::b(0), ByteSize::kib);
    let found = format!("{} available", available.display().iec());
    if available >= MIN_MEMORY {
        return Item::ok("memory", found);
    }
    let fix = format!("free at least {} for a pod", MIN_MEMORY.display().iec());
    Item::missing("memory", found, fix)
}

fn overlay(filesystems: &str) -> Item {
    if filesystems.split_whitespace().any(|name| name == "overlay") {
        return Item::ok("overlayfs", "there");
    }
    Item::warn(
        "overlayfs",
        "not loaded; images need it, --rootfs does not",
        "modprobe overlay",
    )
}

fn vhost() -> Item {
    let there: Vec<&str> = ["vhost-net", "vhost-vsock"]
        .into_iter()
        .filter(|name| Path::new("/dev").join(name).exists())
        .collect();
    let found = if there.is_empty() {
        "none; not needed, devices are served in-process".to_owned()
    } else {
        format!(
            "{}; not needed, devices are served in-process",
            there.join(", ")
        )
    };
    Item::ok("vhost devices", found)
}

fn guest() -> Item {
    let files = match Config::load(None) {
        Ok(config) => config.vm.guest_files(),
        Err(e) => {
            let fix = "correct the configuration file";
            return Item::missing("guest image", chain(&e), fix);
        }
    };
    match files {
        Ok(files) => Item::ok(
            "guest image",
            format!("{}, {}", files.kernel.display(), files.initramfs.display()),
        ),
        Err(e) => Item::missing("guest image", chain(&e), "kuasar-ctl guest build"),
    }
}

fn build_tools() -> Item {
    let missing = guest_image::missing_packages();
    if missing.is_empty() {
        return Item::ok("build tools", "all that building the guest needs");
    }
    let mut packages: Vec<&str> = missing.iter().map(|m| m.package).collect();
    packages.dedup();
    let tools: Vec<&str> = missing.iter().map(|m| m.tool).collect();
    Item::warn(
        "build tools",
        format!(
            "without {} the guest cannot be built here",
            tools.join(", ")
        ),
        format!("apt-get install {}", packages.join(" ")),
    )
}

fn cache() -> Item {
    let path = ImageStore::default_cache();
    let space = path
        .ancestors()
        .find_map(|p| rustix::fs::statvfs(p).ok())
        .map(|fs| ByteSize::b(fs.f_bavail.saturating_mul(fs.f_frsize)));
    match space {
        Some(free) if free >= ByteSize::gib(1) => Item::ok(
            "cache",
            format!("{}, {} free", path.display(), free.display().iec()),
        ),
        Some(free) => Item::warn(
            "cache",
            format!("{}, only {} free", path.display(), free.display().iec()),
            "free some space, or set KUASAR_CACHE_DIR to another disk",
        ),
        None => Item::warn(
            "cache",
            format!("{} cannot be used", path.display()),
            "set KUASAR_CACHE_DIR to a folder of your own",
        ),
    }
}

async fn daemon(global: &Global) -> Item {
    let address = global.address.display();
    match Controller::connect(&global.address).await {
        Ok(Some(_)) => Item::ok("daemon", format!("listens on {address}")),
        Ok(None) => Item::ok(
            "daemon",
            format!("none on {address}; `kuasar-ctl run` brings its own"),
        ),
        Err(e) => Item::warn("daemon", e.what, e.next.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        for good in ["6.1.0-18-amd64", "5.6.0", "10.0"] {
            assert_eq!(kernel(good).verdict, Verdict::Ok, "{good}");
        }
        for bad in ["5.5.19", "4.19.0", "", "x"] {
            assert_eq!(kernel(bad).verdict, Verdict::Missing, "{bad}");
        }
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        let item = memory("MemTotal: 1 kB\nMemAvailable:    1048576 kB\n");
        assert_eq!(
            (item.verdict, item.found.as_str()),
            (Verdict::Ok, "1.0 GiB available")
        );
        assert_eq!(memory("").verdict, Verdict::Missing);
        assert_eq!(memory("MemAvailable: 1024 kB").verdict, Verdict::Missing);
    }

    #[test]
    fn cgroup_versions() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()).verdict, Verdict::Warn);
        fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 1");
        fs::create_dir(dir.path().join("unified")).unwrap();
        fs::write(dir.path().join("unified/cgroup.controllers"), "").unwrap();
        assert!(cgroups(dir.path()).found.starts_with("hybrid"));
        fs::write(dir.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2");
    }

    #[test]
    fn overlay_is_found_by_word() {
        assert_eq!(
            overlay("nodev\tproc\nnodev\toverlay\n").verdict,
            Verdict::Ok
        );
        assert_eq!(overlay("nodev\toverlayish\n").verdict, Verdict::Warn);
    }
}
