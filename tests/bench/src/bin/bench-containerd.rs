//! Pods of our runtime and of runc's, under the same containerd, in turns.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a benchmark reports its failures by panicking"
)]

use std::fs;
use std::time::Instant;

use bench::memory::pss;
use bench::millis;
use bench::report::{OURS, Report};
use clap::Parser;
use e2e::node::{Kubelet, Node};
use harness::containerd::{Line, Options, PAUSE, runc_missing};
use harness::cri::v1;
use harness::image::{Image, Layer};
use serde_json::json;
use vmm_core::Host;

/// Measures pods through containerd's CRI, beside runc's.
#[derive(Debug, Parser)]
struct Args {
    /// Pods of each runtime; the table shows medians
    #[arg(long, default_value_t = 10)]
    runs: usize,
}

const STEPS: [&str; 5] = [
    "RunPodSandbox",
    "container created and started",
    "ExecSync of true",
    "container stopped (KILL)",
    "pod stopped and removed",
];

const RUNC: &str = "runc";

fn main() {
    let args = Args::parse();
    if let Some(why) = Line::V2.missing().or_else(runc_missing) {
        println!("skipped: {why}");
        return;
    }
    let host = Host::probe().expect("a usable /dev/kvm");
    let mut report = Report::new("containerd", &host);
    let options = Options {
        runc: true,
        ..Options::default()
    };
    let node = Node::with_config("", &options);
    import_pause(&node);
    let runc = Kubelet {
        cri: node.containerd.cri(),
        handler: RUNC.to_owned(),
        image: node.image.clone(),
        logs: node.logs.clone(),
    };
    let subjects = [(OURS, &node.kubelet), (RUNC, &runc)];
    for (name, kubelet) in &subjects {
        // What is made once (a template, an unpacked image) is not a pod's.
        one(kubelet, &format!("first-{name}"));
    }
    let mut samples = vec![vec![Vec::new(); STEPS.len()]; subjects.len()];
    for run in 0..args.runs {
        for ((name, kubelet), samples) in subjects.iter().zip(&mut samples) {
            println!("{name}: pod {} of {}", run + 1, args.runs);
            for (took, samples) in one(kubelet, &format!("{name}-{run}")).iter().zip(samples) {
                samples.push(*took);
            }
        }
    }
    for ((name, _), samples) in subjects.iter().zip(samples) {
        for (step, samples) in STEPS.iter().zip(samples) {
            report.add(name, step, "ms", samples);
        }
    }
    for (name, kubelet) in &subjects {
        let (host, guest) = memory(&node, kubelet, args.runs.min(5));
        report.add(
            name,
            "memory of an idle pod, host's part",
            "KiB",
            vec![host],
        );
        if *name == OURS {
            report.add(name, "memory of its guest", "KiB", vec![guest]);
        }
    }
    report.print();
    let path = report.write().expect("write the JSON file");
    println!("\nwritten to {}", path.display());
}

/// runc's pods need a process that does nothing.
fn import_pause(node: &Node) {
    let layer = Layer::new().tree(&node.world.rootfs, "".as_ref());
    let config = json!({"Cmd": ["/bin/sleep", "1000000"]});
    let archive = node.world.scratch().join("pause.tar");
    let archive = Image::new([layer], &config).docker_archive(&archive, PAUSE);
    node.containerd.import(&archive, PAUSE);
}

/// A pod's life: how long each of [`STEPS`] took, in milliseconds.
fn one(kubelet: &Kubelet, name: &str) -> [f64; 5] {
    let mut last = Instant::now();
    let mut step = || {
        let took = millis(last.elapsed());
        last = Instant::now();
        took
    };
    let pod = kubelet.run_pod(name);
    let sandbox = step();
    let id = pod.run(&format!("{name}-main"), "sleep 1000000");
    let container = step();
    let (_, _, code) = kubelet.exec(&id, "true");
    assert_eq!(code, 0, "exec");
    let exec = step();
    kubelet.stop_container(&id, 0);
    let stop = step();
    kubelet.remove_pod(&pod.id);
    [sandbox, container, exec, stop, step()]
}

/// What each of `count` idle pods takes of the host: its processes', and its guest's.
fn memory(node: &Node, kubelet: &Kubelet, count: usize) -> (f64, f64) {
    let before = held(node);
    let pods: Vec<_> = (0..count)
        .map(|number| kubelet.run_pod(&format!("idle-{}-{number}", kubelet.handler)))
        .collect();
    for pod in &pods {
        assert_eq!(
            kubelet.pod_state(&pod.id),
            v1::PodSandboxState::SandboxReady
        );
    }
    let after = held(node);
    for pod in &pods {
        kubelet.remove_pod(&pod.id);
    }
    let each = |of: fn(&(f64, f64)) -> f64| (of(&after) - of(&before)) / count.max(1) as f64;
    (each(|held| held.0), each(|held| held.1))
}

/// Proportional set size of the daemon, of runc's shims and of the processes they hold, in KiB;
/// guests' memory apart.
fn held(node: &Node) -> (f64, f64) {
    let address = node.containerd.dir().join("containerd.sock");
    let address = address.to_string_lossy();
    let mut pids = vec![node.world.daemon.pid()];
    let numbers = fs::read_dir("/proc").expect("list processes").flatten();
    let numbers: Vec<u32> = numbers
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let shims: Vec<u32> = numbers
        .iter()
        .copied()
        .filter(|pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.contains("containerd-shim-runc") && line.contains(&*address)
        })
        .collect();
    let children = numbers.into_iter().filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1));
        parent
            .and_then(|parent| parent.parse().ok())
            .is_some_and(|parent| shims.contains(&parent))
    });
    pids.extend(children);
    pids.extend(&shims);
    let held = pids.iter().filter_map(|pid| pss(*pid, &["memfd:"]).ok());
    held.fold((0.0, 0.0), |sum, pss| {
        (sum.0 + pss.own_kib as f64, sum.1 + pss.guest_kib as f64)
    })
}
