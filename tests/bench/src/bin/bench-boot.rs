//! Boot phases of a pod, and the same guest under other VMMs in the same run.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a benchmark reports its failures by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bench::memory::pss;
use bench::millis;
use bench::peer::{Boot, Guest, MARKER, Peer};
use bench::report::{OURS, Report};
use clap::Parser;
use harness::ctl::Ctl;
use harness::daemon::Daemon;
use harness::eventually;
use serde_json::Value;
use vmm_core::Host;

/// Measures how long a pod takes to boot, phase by phase, beside other VMMs.
#[derive(Debug, Parser)]
struct Args {
    /// Runs of each; the table shows medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

/// No VMM may take longer than this.
const LIMIT: Duration = Duration::from_secs(600);

fn main() {
    let args = Args::parse();
    let host = Host::probe().expect("a usable /dev/kvm");
    let mut report = Report::new("boot", &host);
    let guest = GuestFiles::built();
    pods(&args, &guest, &mut report);
    vmms(&args, &host, &guest, &mut report);
    report.print();
    println!(
        "\nwritten to {}",
        report.write().expect("write the JSON file").display()
    );
}

/// What every VMM boots.
struct GuestFiles {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl GuestFiles {
    /// What `kuasar-ctl guest build` built last.
    fn built() -> Self {
        let info = Command::new(harness::bin_dir().join("kuasar-ctl"))
            .args(["guest", "info", "--json"])
            .output()
            .expect("start kuasar-ctl");
        let info: Value =
            serde_json::from_slice(&info.stdout).expect("a guest image that was built");
        let path = |key: &str| info[key].as_str().map(PathBuf::from).expect(key);
        Self {
            kernel: path("kernel"),
            initramfs: path("initramfs"),
        }
    }
}

/// Samples by what they measure, in the order of their first ones.
#[derive(Debug, Default)]
struct Samples(Vec<(String, &'static str, Vec<f64>)>);

impl Samples {
    fn push(&mut self, name: &str, unit: &'static str, sample: f64) {
        match self.0.iter_mut().find(|(known, _, _)| known == name) {
            Some((_, _, samples)) => samples.push(sample),
            None => self.0.push((name.to_owned(), unit, vec![sample])),
        }
    }
}

/// Pods through the daemon and the CLI: phases, exits, memory. Each runs `/bin/true`, and is
/// idle from then on: the guest with its agent is there, the container has ended. The pods stay
/// until all are measured: freed memory of one would serve the next.
fn pods(args: &Args, guest: &GuestFiles, report: &mut Report) {
    let scratch = tempfile::tempdir().expect("temporary folder");
    let rootfs = harness::rootfs::busybox(scratch.path());
    let daemon = Daemon::start(&format!(
        "[vm]\nkernel = {:?}\ninitramfs = {:?}\n[templates]\nmode = \"off\"\n",
        guest.kernel, guest.initramfs
    ));
    let ctl = Ctl::new(&daemon);
    let own_kib = || {
        let now = pss(daemon.pid(), &["memfd:"]).expect("memory of the daemon");
        now.own_kib as f64
    };
    report.add(OURS, "daemon PSS without pods", "KiB", vec![own_kib()]);
    let mut times = Samples::default();
    let mut exits = Samples::default();
    let mut memory = Samples::default();
    for run in 0..args.runs {
        println!("pod {} of {}", run + 1, args.runs);
        let name = format!("bench{run}");
        let empty = own_kib();
        let start = Instant::now();
        start_pod(&ctl, &name, &rootfs);
        let returned = millis(start.elapsed());
        let facts = eventually("the exit of the container", LIMIT, || {
            let facts = ctl.run(["inspect", "--json", &name]);
            let facts: Value = serde_json::from_str(&facts.expect_code(0).stdout).expect("JSON");
            let seen = phases(&facts).iter().any(|phase| phase.name == "exit seen");
            seen.then_some(facts)
        });
        phase_samples(&facts, &mut times, &mut exits);
        times.push("run --detach returned (CLI)", "ms", returned);
        let grown = match run {
            0 => "daemon PSS: the first idle pod",
            _ => "daemon PSS: each further idle pod",
        };
        memory.push(grown, "KiB", own_kib() - empty);
        if let Some(bytes) = find(&facts, "resident_bytes").and_then(Value::as_f64) {
            memory.push("guest pages of an idle pod", "KiB", bytes / 1024.0);
        }
    }
    for run in 0..args.runs {
        let name = format!("bench{run}");
        ctl.run(["rm", "--force", &name]).expect_code(0);
    }
    for (name, unit, samples) in [times, exits, memory].into_iter().flat_map(|s| s.0) {
        report.add(OURS, &name, unit, samples);
    }
}

/// A phase of a pod's start as `inspect` tells it.
struct Phase<'a> {
    name: &'a str,
    ms: f64,
    exits: f64,
}

fn phases(facts: &Value) -> Vec<Phase<'_>> {
    let list = find(facts, "phases").and_then(Value::as_array);
    let read = |phase: &'_ Value| -> Option<(f64, f64)> {
        let counts = phase.get("exits")?.as_object()?;
        let exits = counts.values().filter_map(Value::as_f64).sum();
        Some((phase.get("us")?.as_f64()? / 1e3, exits))
    };
    list.into_iter()
        .flatten()
        .filter_map(|phase| {
            let name = phase.get("name")?.as_str()?;
            let (ms, exits) = read(phase)?;
            Some(Phase { name, ms, exits })
        })
        .collect()
}

/// Times since building the VM began, and how many exits each phase cost.
fn phase_samples(facts: &Value, times: &mut Samples, exits: &mut Samples) {
    let init_ms = find(facts, "init_at_us").and_then(Value::as_f64);
    let mut before = 0.0;
    for phase in phases(facts) {
        times.push(phase.name, "ms", phase.ms);
        exits.push(
            &format!("exits until {}", phase.name),
            "exits",
            phase.exits - before,
        );
        before = phase.exits;
        // The guest's clock starts a little after the kernel's entry.
        if let ("kernel entered", Some(init_ms)) = (phase.name, init_ms.map(|us| us / 1e3)) {
            times.push("/init (by the guest's clock)", "ms", phase.ms + init_ms);
        }
    }
}

fn start_pod(ctl: &Ctl, name: &str, rootfs: &Path) {
    let rootfs = rootfs.to_string_lossy();
    #[rustfmt::skip]
    let run = ["run", "--detach", "--name", name, "--rootfs", &*rootfs, "--", "/bin/true"];
    ctl.run(run).expect_code(0);
}

/// The VMM alone, started as a process, until its guest's kernel is done.
fn vmms(args: &Args, host: &Host, guest: &GuestFiles, report: &mut Report) {
    let guest = Guest::new(host, &guest.kernel, &guest.initramfs);
    let boot = harness::bin_dir().join("examples/boot");
    let (peers, missing) = Peer::find();
    report.skipped.extend(missing);
    let mut all: Vec<(Peer, Vec<Boot>)> = std::iter::once(Peer::ours(OURS, boot))
        .chain(peers)
        .map(|peer| (peer, Vec::new()))
        .collect();
    // In turns, so that what else the host does meanwhile falls on all alike.
    for run in 0..args.runs {
        for (peer, boots) in all.iter_mut().filter(|(_, boots)| boots.len() == run) {
            println!("{}: boot {} of {}", peer.name, run + 1, args.runs);
            match peer.boot(&guest, MARKER, LIMIT) {
                Ok(boot) => boots.push(boot),
                Err(why) => report.skipped.push(format!("{}: {why}", peer.name)),
            }
        }
    }
    for (peer, boots) in all {
        let (took, cpu) = boots
            .iter()
            .map(|b| (millis(b.took), millis(b.cpu)))
            .unzip();
        if peer.name != OURS {
            let name = peer.name.to_owned();
            report.versions.push((name, peer.version.clone()));
        }
        report.add(peer.name, "VMM started to /init", "ms", took);
        report.add(peer.name, "CPU time of the VMM until then", "ms", cpu);
    }
}

/// The first value named `key`, at any depth.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map
            .get(key)
            .or_else(|| map.values().find_map(|inner| find(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}
