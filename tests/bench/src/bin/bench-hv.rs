//! The same guest and the same work on each backend that this host has.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a benchmark reports its failures by panicking"
)]

use std::fs;
use std::path::Path;
use std::time::Instant;

use bench::backend::{self, Backend, Programs};
use bench::memory::pss;
use bench::millis;
use bench::report::Report;
use clap::Parser;
use harness::ctl::Ctl;
use harness::daemon::Daemon;
use serde_json::Value;
use vmm_core::Host;

/// Measures start, memory, share, vsock and exec of a pod on each backend.
#[derive(Debug, Parser)]
struct Args {
    /// Pods of each backend; the table shows medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Size of what is read and sent, in MiB
    #[arg(long, default_value_t = 8)]
    mib: u32,
    #[command(flatten)]
    programs: Programs,
}

fn main() {
    let args = Args::parse();
    let host = Host::probe().expect("a usable /dev/kvm");
    let mut report = Report::new("hv", &host);
    let scratch = tempfile::tempdir().expect("temporary folder");
    let rootfs = harness::rootfs::busybox(scratch.path());
    let data = scratch.path().join("data");
    fs::create_dir(&data).expect("make a folder");
    let bytes = usize::try_from(args.mib).expect("a size") << 20;
    fs::write(data.join("file"), vec![7; bytes]).expect("write the data");
    for backend in args.programs.here(&mut report) {
        measure(&backend, &args, &rootfs, &data, &mut report);
    }
    report.print();
    let path = report.write().expect("write the JSON file");
    println!("\nwritten to {}", path.display());
}

fn measure(backend: &Backend, args: &Args, rootfs: &Path, data: &Path, report: &mut Report) {
    let daemon = Daemon::start(&backend.config);
    let ctl = Ctl::new(&daemon);
    let volume = format!("{}:/data", data.display());
    let rootfs = rootfs.to_str().expect("a path of UTF-8");
    let start = |name: &str| {
        let begun = Instant::now();
        #[rustfmt::skip]
        let run = ctl.run([
            "run", "--detach", "--name", name, "--volume", &volume, "--rootfs", rootfs, "--",
            "/bin/sleep", "100000",
        ]);
        run.expect_code(0);
        millis(begun.elapsed())
    };
    let exec = |name: &str, command: &str| {
        let begun = Instant::now();
        let run = ctl.run(["exec", name, "--", "/bin/sh", "-c", command]);
        run.expect_code(0);
        millis(begun.elapsed())
    };
    // What is made once per daemon (a template) is not a pod's.
    start("first");
    ctl.run(["rm", "--force", "first"]).expect_code(0);
    let empty = memory(&daemon);
    let mut samples: [Vec<f64>; 6] = Default::default();
    for run in 0..args.runs {
        println!("{}: pod {} of {}", backend.name, run + 1, args.runs);
        let name = format!("p{run}");
        samples[0].push(start(&name));
        let facts = ctl.run(["inspect", "--json", &name]);
        let facts: Value = serde_json::from_str(&facts.expect_code(0).stdout).expect("JSON");
        let phases = facts.pointer("/status/vm/phases").and_then(Value::as_array);
        let ready = phases.into_iter().flatten().find_map(|phase| {
            let is_it = phase["name"] == "agent ready";
            is_it.then(|| phase["us"].as_f64()).flatten()
        });
        samples[1].extend(ready.map(|us| us / 1e3));
        let idle = exec(&name, "true");
        samples[2].push(idle);
        let mib = f64::from(args.mib);
        let rate = |ms: f64| mib / ((ms - idle).max(1.0) / 1e3);
        samples[3].push(rate(exec(&name, "cat /data/file > /dev/null")));
        let count = format!("head -c {}M /dev/zero", args.mib);
        samples[4].push(rate(exec(&name, &count)));
    }
    let pods = args.runs.max(1) as f64;
    samples[5].push((memory(&daemon) - empty) / pods);
    for run in 0..args.runs {
        ctl.run(["rm", "--force", &format!("p{run}")])
            .expect_code(0);
    }
    let names = [
        ("run --detach (CLI)", "ms"),
        ("machine built to agent ready", "ms"),
        ("exec of true (CLI)", "ms"),
        ("share: first read", "MiB/s"),
        ("vsock: output", "MiB/s"),
        ("memory of a pod without guest pages", "KiB"),
    ];
    for ((name, unit), samples) in names.into_iter().zip(samples) {
        report.add(backend.name, name, unit, samples);
    }
}

/// Memory of the daemon and all its VMMs and supervisors, without guest pages, in KiB.
fn memory(daemon: &Daemon) -> f64 {
    let guest = ["memfd:", "ram0", "memory-backend"];
    let pids = backend::processes(daemon);
    let own = pids.iter().filter_map(|pid| pss(*pid, &guest).ok());
    own.map(|pss| pss.own_kib as f64).sum()
}
