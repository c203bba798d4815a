//! Boot phases of a pod, and the same guest under other VMMs in the same run.
#![allow(
    clippy::expect_used,
    reason = "a benchmark reports its failures by panicking"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use bench::memory::pss;
use bench::millis;
use bench::peer::{Guest, Peer};
use bench::report::Report;
use clap::Parser;
use harness::ctl::Ctl;
use harness::daemon::Daemon;
use serde_json::Value;
use vmm_core::Host;

/// Measures how long a pod takes to boot, phase by phase, beside other VMMs.
#[derive(Debug, Parser)]
struct Args {
    /// Runs of each; the table shows medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Idle pods to share the daemon's memory over
    #[arg(long, default_value_t = 2)]
    pods: usize,
}

/// The last thing every kernel says before it hands over to the agent.
const MARKER: &str = "Run /init as init process";

/// No VMM may take longer than this.
const LIMIT: Duration = Duration::from_secs(600);

const OURS: &str = "kuasar-embed";

fn main() {
    let args = Args::parse();
    let host = Host::probe().expect("a usable /dev/kvm");
    let kind = if host.emulated_ring0() {
        "emulated ring 0"
    } else {
        "hardware"
    };
    let mut report = Report::new("boot", kind.to_owned());
    report
        .versions
        .push((OURS.to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    pods(&args, &mut report);
    vmms(&args, &host, &mut report);
    report.print();
    println!(
        "\nwritten to {}",
        report.write().expect("write the JSON file").display()
    );
}

/// Pods through the daemon and the CLI: phases, exits, memory.
fn pods(args: &Args, report: &mut Report) {
    let scratch = tempfile::tempdir().expect("temporary folder");
    let rootfs = harness::rootfs::busybox(scratch.path());
    let mut phases: Vec<(String, Vec<f64>)> = Vec::new();
    let mut exits: Vec<(String, Vec<f64>)> = Vec::new();
    let daemon = Daemon::start("");
    let ctl = Ctl::new(&daemon);
    let empty = pss(daemon.pid(), &["memfd:"])
        .expect("memory of the daemon")
        .own_kib;
    for run in 0..args.runs.max(args.pods) {
        println!("pod {} of {}", run + 1, args.runs.max(args.pods));
        let name = format!("bench{run}");
        let start = Instant::now();
        start_pod(&ctl, &name, &rootfs);
        push(
            &mut phases,
            "kuasar-ctl run --detach returned",
            millis(start.elapsed()),
        );
        let facts = ctl.run(["inspect", "--json", &name]);
        let facts: Value = serde_json::from_str(&facts.expect_code(0).stdout).expect("JSON");
        for phase in find(&facts, "phases")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            if let (Some(name), Some(us)) = (phase["name"].as_str(), phase["us"].as_f64()) {
                push(&mut phases, name, us / 1e3);
            }
        }
        for (kind, count) in find(&facts, "exits")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            push(
                &mut exits,
                &format!("vCPU exits: {kind}"),
                count.as_f64().unwrap_or_default(),
            );
        }
        if run + 1 == args.pods {
            let now = pss(daemon.pid(), &["memfd:"])
                .expect("memory of the daemon")
                .own_kib;
            let each = now.saturating_sub(empty) as f64 / args.pods as f64;
            report.add(OURS, "daemon PSS per idle pod", "KiB", vec![each]);
        }
        if run >= args.pods {
            ctl.run(["rm", "--force", &name]);
        }
    }
    for (name, samples) in phases {
        report.add(OURS, &name, "ms", samples);
    }
    for (name, samples) in exits {
        report.add(OURS, &name, "exits", samples);
    }
}

fn start_pod(ctl: &Ctl, name: &str, rootfs: &Path) {
    let rootfs = rootfs.to_string_lossy();
    let run = [
        "run", "--detach", "--name", name, "--rootfs", &*rootfs, "--",
    ];
    ctl.run(run.into_iter().chain(["/bin/sleep", "1000000"]))
        .expect_code(0);
}

/// The VMM alone, started as a process, until its guest's kernel is done.
fn vmms(args: &Args, host: &Host, report: &mut Report) {
    let files = sandboxer::config::Vm::default()
        .guest_files()
        .expect("a guest image");
    let mut words = vec!["console=ttyS0", "reboot=k", "panic=-1", "acpi=off"];
    words.extend(
        host.kernel_parameters()
            .iter()
            .filter(|word| **word != "quiet"),
    );
    words.push("loglevel=7");
    let guest = Guest {
        kernel: files.kernel,
        initramfs: files.initramfs,
        memory_mib: 128,
        cmdline: words.join(" "),
    };
    let boot = harness::bin_dir().join("examples/boot");
    let (peers, missing) = Peer::find();
    report.skipped.extend(missing);
    for peer in std::iter::once(Peer::ours(OURS, boot)).chain(peers) {
        let mut samples = Vec::new();
        for run in 0..args.runs {
            println!("{}: boot {} of {}", peer.name, run + 1, args.runs);
            match peer.boot(&guest, MARKER, LIMIT) {
                Ok(took) => samples.push(millis(took)),
                Err(why) => {
                    report.skipped.push(format!("{}: {why}", peer.name));
                    break;
                }
            }
        }
        if peer.name != OURS {
            report
                .versions
                .push((peer.name.to_owned(), peer.version.clone()));
        }
        report.add(peer.name, "VMM started to /init", "ms", samples);
    }
}

fn push(into: &mut Vec<(String, Vec<f64>)>, name: &str, sample: f64) {
    match into.iter_mut().find(|(known, _)| known == name) {
        Some((_, samples)) => samples.push(sample),
        None => into.push((name.to_owned(), vec![sample])),
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
