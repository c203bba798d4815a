//! How long a pod's machine takes as a clone of a template, beside a boot.
#![allow(
    clippy::expect_used,
    reason = "a benchmark reports its failures by panicking"
)]

use std::future::ready;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::memory::pss;
use bench::millis;
use bench::peer::Guest;
use bench::qemu_restore;
use bench::report::Report;
use clap::Parser;
use harness::ctl::Ctl;
use harness::daemon::Daemon;
use nix::sys::resource::{UsageWho, getrusage};
use sandboxer::agent::{Connected, Limits};
use sandboxer::backend::vmm::VmmBackend;
use sandboxer::backend::{Built, MachineRequest, SandboxBackend};
use sandboxer::config::{Config, TemplateMode};
use vmm_core::Host;
use vmm_core::vm::Vm;

/// Measures clones of a template, phase by phase, beside boots and QEMU's own restore.
#[derive(Debug, Parser)]
struct Args {
    /// Clones, one after the other; the table shows medians and 99th percentiles
    #[arg(long, default_value_t = 60)]
    clones: usize,
    /// Clones at the same time
    #[arg(long, default_value_t = 50)]
    parallel: usize,
    /// Whole containers, from `kuasar-ctl run` to their first output
    #[arg(long, default_value_t = 3)]
    containers: usize,
}

const WARM: &str = "warm clone";
const OURS: &str = "clone, shells ahead";
const PLAIN: &str = "clone, no shells";
const BOOT: &str = "boot";
/// Nothing here may take longer.
const LIMIT: Duration = Duration::from_secs(600);
const STOP_LIMIT: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let args = Args::parse();
    let host = Host::probe().expect("a usable /dev/kvm");
    let mut report = Report::new("template", &host);
    let scratch = tempfile::tempdir().expect("a scratch folder");
    for (subject, mode, warm, shells, runs) in [
        (WARM, TemplateMode::Auto, 1, 0, args.clones),
        (OURS, TemplateMode::Auto, 0, 2, args.clones),
        (PLAIN, TemplateMode::Auto, 0, 0, args.clones),
        (BOOT, TemplateMode::Off, 0, 0, 1),
    ] {
        let backend = backend(mode, warm, shells).await;
        serial(&backend, subject, runs, scratch.path(), &mut report).await;
    }
    parallel(&args, scratch.path(), &mut report).await;
    containers(&args, &mut report);
    let files = Config::default().vm.guest_files().expect("a guest image");
    let guest = Guest::new(&host, &files.kernel, &files.initramfs);
    match qemu_restore::measure(&guest, 3) {
        Ok(peer) => {
            report.versions.push(("qemu kvm".to_owned(), peer.version));
            report.add("qemu kvm", "restore to running", "ms", peer.samples);
        }
        Err(why) => report.skipped.push(format!("qemu kvm: {why}")),
    }
    report.print();
    println!(
        "\nwritten to {}",
        report.write().expect("write the JSON file").display()
    );
}

async fn backend(mode: TemplateMode, warm: usize, shells: usize) -> VmmBackend {
    let mut config = Config::default();
    config.templates.mode = mode;
    config.templates.warm = warm;
    config.templates.shells = shells;
    let backend = VmmBackend::new(&config).await.expect("a backend");
    if mode == TemplateMode::Auto {
        // The first may take a boot.
        backend.prepare(&request(Path::new("/"), "none")).await;
    }
    backend
}

fn request(dir: &Path, pod: &str) -> MachineRequest {
    let vm = Config::default().vm;
    MachineRequest {
        pod: pod.to_owned(),
        vcpus: vm.vcpus,
        memory_bytes: vm.memory.as_u64(),
        share: dir.join("share"),
        dir: dir.to_owned(),
        netns: None,
        limits: None,
        disks: Vec::new(),
    }
}

/// A machine whose agent has answered.
struct Up {
    vm: Arc<dyn Vm>,
    _connected: Connected,
    /// Until its vCPU was told to run.
    host: Duration,
    /// Until the agent had answered a call.
    agent: Duration,
}

async fn up(backend: &VmmBackend, dir: &Path, pod: &str) -> Up {
    let dir = dir.join(pod);
    std::fs::create_dir_all(dir.join("share")).expect("a share");
    let begin = Instant::now();
    let built = backend.build(request(&dir, pod)).await;
    let Built { vm, met } = built.expect("a machine");
    let limits = Limits {
        boot: LIMIT,
        call: LIMIT,
        connect: LIMIT,
    };
    let agent = match met {
        Some(connected) => Box::pin(ready(Ok(connected))),
        None => backend.agent(pod, vm.as_ref(), limits).expect("a listener"),
    };
    vm.start().await.expect("a start");
    let host = begin.elapsed();
    let connected = agent.await.expect("an agent");
    vm.mark_phase("agent there");
    // A call that costs the agent nothing, whatever it says.
    let _ = connected.client.list_pids("none").await;
    vm.mark_phase("agent answered a call");
    Up {
        vm,
        _connected: connected,
        host,
        agent: begin.elapsed(),
    }
}

async fn down(up: Up, dir: &Path, pod: &str) {
    up.vm.stop(STOP_LIMIT).await.expect("a stop");
    drop(up);
    std::fs::remove_dir_all(dir.join(pod)).expect("remove the folder");
}

fn faults() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the process's usage");
    f64::from(i32::try_from(usage.minor_page_faults()).unwrap_or(i32::MAX))
}

async fn serial(backend: &VmmBackend, subject: &str, runs: usize, dir: &Path, report: &mut Report) {
    let (mut host, mut agent, mut faulted) = (Vec::new(), Vec::new(), Vec::new());
    let mut phases: Vec<(&'static str, Vec<f64>)> = Vec::new();
    let mut exits = Vec::new();
    if subject == WARM {
        // Has the first one made.
        down(up(backend, dir, "serial").await, dir, "serial").await;
    }
    for _ in 0..runs {
        if subject == WARM {
            backend.warm_clone_waits().await;
        }
        let before = faults();
        let up = up(backend, dir, "serial").await;
        faulted.push(faults() - before);
        host.push(millis(up.host));
        agent.push(millis(up.agent));
        let stats = up.vm.stats();
        let mut last = Duration::ZERO;
        for phase in &stats.phases {
            let took = millis(phase.since.saturating_sub(last));
            last = phase.since;
            match phases.iter_mut().find(|(name, _)| *name == phase.name) {
                Some((_, samples)) => samples.push(took),
                None => phases.push((phase.name, vec![took])),
            }
        }
        exits.push(
            stats
                .exits
                .values()
                .map(|count| f64::from(u32::try_from(*count).unwrap_or(0)))
                .sum(),
        );
        down(up, dir, "serial").await;
    }
    report.add(subject, "to the vCPU's start", "ms", host);
    report.add(subject, "to the agent's answer", "ms", agent);
    for (name, samples) in phases {
        report.add(subject, &format!("  step: {name}"), "ms", samples);
    }
    report.add(subject, "exits", "exits", exits);
    report.add(subject, "page faults of the daemon", "faults", faulted);
}

/// Many at once, and what they hold while nothing happens.
async fn parallel(args: &Args, dir: &Path, report: &mut Report) {
    let backend = Arc::new(backend(TemplateMode::Auto, 0, args.parallel).await);
    let names = ["memfd:template"];
    let me = std::process::id();
    let before = pss(me, &names).expect("own memory");
    let begin = Instant::now();
    let clones: Vec<_> = (0..args.parallel)
        .map(|index| {
            let (backend, dir) = (Arc::clone(&backend), dir.to_owned());
            tokio::spawn(async move { up(&backend, &dir, &format!("p{index}")).await })
        })
        .collect();
    let mut ups = Vec::new();
    for clone in clones {
        ups.push(clone.await.expect("a clone"));
    }
    report.add(
        OURS,
        &format!("{} in parallel, all answered", args.parallel),
        "ms",
        vec![millis(begin.elapsed())],
    );
    report.add(
        OURS,
        "one of them",
        "ms",
        ups.iter().map(|up| millis(up.agent)).collect(),
    );
    let after = pss(me, &names).expect("own memory");
    let count = f64::from(u32::try_from(args.parallel.max(1)).unwrap_or(1));
    let per_clone = |before: u64, after: u64| {
        f64::from(u32::try_from(after.saturating_sub(before)).unwrap_or(0)) / count
    };
    report.add(
        OURS,
        "daemon memory per clone",
        "KiB PSS",
        vec![per_clone(before.own_kib, after.own_kib)],
    );
    let own: Vec<f64> = ups
        .iter()
        .filter_map(|up| up.vm.stats().resident_bytes)
        .map(|bytes| f64::from(u32::try_from(bytes >> 10).unwrap_or(0)))
        .collect();
    report.add(OURS, "guest pages of its own", "KiB", own);
    for (index, up) in ups.into_iter().enumerate() {
        down(up, dir, &format!("p{index}")).await;
    }
}

/// The whole way: CLI, daemon, clone, container, output, clean-up.
fn containers(args: &Args, report: &mut Report) {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let rootfs = harness::rootfs::busybox(scratch.path());
    let rootfs = rootfs.to_str().expect("a UTF-8 path");
    for (subject, config, runs) in [
        (OURS, "", args.containers),
        (BOOT, "[templates]\nmode = \"off\"\n", 1),
    ] {
        let daemon = Daemon::start(config);
        let ctl = Ctl::new(&daemon);
        let mut samples = Vec::new();
        for _ in 0..runs {
            let begin = Instant::now();
            let run = ctl.run(["run", "--rootfs", rootfs, "--", "/bin/echo", "out"]);
            run.expect_code(0);
            samples.push(millis(begin.elapsed()));
        }
        report.add(subject, "kuasar-ctl run, begin to end", "ms", samples);
    }
}
