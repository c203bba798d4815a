//! Disk, share, network and vsock inside a guest, on each backend that this host has.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark reports its failures by panicking"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use bench::backend::{self, Backend, Programs};
use bench::peer::cpu_time;
use bench::report::Report;
use clap::Parser;
use harness::ctl::Ctl;
use harness::daemon::Daemon;
use harness::netns::NetNs;
use serde_json::Value;
use vmm_core::Host;

/// Measures disk, share, network and vsock inside a pod on each backend.
#[derive(Debug, Parser)]
struct Args {
    /// How long each kind of work goes on, in seconds
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Backends to leave out, as the table names them
    #[arg(long)]
    without: Vec<String>,
    #[command(flatten)]
    programs: Programs,
}

const POD: &str = "io";
const HOST_ADDRESS: &str = "10.78.0.1";
const GUEST_ADDRESS: &str = "10.78.0.2";
const TCP_PORT: u16 = 5201;
const VSOCK_PORT: u16 = 5202;
const FILE_MIB: u64 = 32;
/// When a guest has had its time, the slowest included.
const LIMIT_SECONDS: u64 = 900;

/// What is done: its name in the table, and as the guest's program has it.
fn work() -> Vec<(String, String)> {
    let mut work = Vec::new();
    for (what, path) in [("disk", "/dev/disk"), ("share", "/data/file")] {
        // A mapping of a disk is the guest's own business.
        let operations = ["read", "write", "map"].into_iter();
        for operation in operations.filter(|what| *what != "map" || path.starts_with("/data")) {
            for kib in [4, 128] {
                let name = format!("{what} {operation} {kib} KiB");
                work.push((name, format!("{operation}:{path}:{}", kib << 10)));
            }
        }
    }
    let tcp = format!("tcp:{HOST_ADDRESS}:{TCP_PORT}");
    let vsock = format!("vsock:{VSOCK_PORT}");
    for (what, peer) in [("TCP", tcp), ("vsock", vsock)] {
        for (operation, size, bytes) in [
            ("send", "64 KiB", 64 << 10),
            ("receive", "64 KiB", 64 << 10),
            ("ping", "1 byte", 1),
        ] {
            let name = format!("{what} {operation} {size}");
            work.push((name, format!("{operation}:{peer}:{bytes}")));
        }
    }
    work
}

fn main() {
    let args = Args::parse();
    let host = Host::probe().expect("a usable /dev/kvm");
    let mut report = Report::new("io", &host);
    let mut work = work();
    if let Some(why) = NetNs::missing() {
        work.retain(|(name, _)| !name.starts_with("TCP"));
        report.skipped.push(format!("TCP: {why}"));
    }
    let scratch = tempfile::tempdir().expect("temporary folder");
    let rootfs = harness::rootfs::busybox(scratch.path());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/io.c");
    let built = Command::new("cc")
        .args(["-O2", "-static", "-o"])
        .args([&rootfs.join("bin/io"), &source])
        .status();
    assert!(built.expect("run cc").success(), "cc failed");
    let share = work.iter().filter(|(name, _)| name.starts_with("share"));
    let share: Vec<_> = share.cloned().collect();
    let others = args.programs.here(&mut report).into_iter();
    let others = others.map(|backend| (backend, work.as_slice()));
    for (backend, work) in others.chain([(Programs::with_window(), share.as_slice())]) {
        if !args.without.iter().any(|name| name == backend.name) {
            measure(&backend, &args, work, &rootfs, &mut report);
        }
    }
    report.print();
    let path = report.write().expect("write the JSON file");
    println!("\nwritten to {}", path.display());
}

/// The namespaces of the peer and of the pod, joined by one link.
fn network() -> (NetNs, NetNs) {
    let (peer, pod) = (NetNs::new(), NetNs::new());
    let path = pod.path();
    let path = path.display();
    peer.ip(&format!(
        "link add port type veth peer name eth0 netns {path}"
    ));
    peer.ip(&format!("address add {HOST_ADDRESS}/24 dev port"));
    peer.ip("link set port up");
    pod.ip(&format!("address add {GUEST_ADDRESS}/24 dev eth0"));
    pod.ip("link set eth0 up");
    (peer, pod)
}

fn measure(
    backend: &Backend,
    args: &Args,
    work: &[(String, String)],
    rootfs: &Path,
    report: &mut Report,
) {
    println!("{}", backend.name);
    let daemon = Daemon::start(&backend.config);
    let ctl = Ctl::new(&daemon);
    let scratch = tempfile::tempdir().expect("temporary folder");
    for name in ["disk", "file"] {
        // Written, so that reads find blocks of the host's file system.
        let content = vec![7; usize::try_from(FILE_MIB << 20).expect("a size")];
        fs::write(scratch.path().join(name), content).expect("write a file");
    }
    let data = scratch.path().display();
    let (disk, volume) = (format!("{data}/disk:/dev/disk"), format!("{data}:/data"));
    #[rustfmt::skip]
    let mut run = vec![
        "run", "--detach", "--name", POD, "--disk", &disk, "--volume", &volume,
        "--rootfs", rootfs.to_str().expect("a path of UTF-8"),
    ];
    let network = NetNs::missing().is_none().then(network);
    let netns = network.as_ref().map(|(_, pod)| pod.path());
    if let Some(netns) = &netns {
        run.extend(["--netns", netns.to_str().expect("a path of UTF-8")]);
    }
    run.extend(["--", "/bin/sleep", "100000"]);
    let started = ctl.run(&run);
    if started.code != Some(0) {
        let why = started.stderr.trim().replace('\n', "; ");
        report.skipped.push(format!("{}: {why}", backend.name));
        return;
    }
    if let Some((peer, _)) = &network {
        let listener = peer.run(|| TcpListener::bind((HOST_ADDRESS, TCP_PORT)));
        let listener = listener.expect("listen for the guest");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = stream.set_nodelay(true);
                thread::spawn(move || serve(stream));
            }
        });
    }
    let seconds = args.seconds.to_string();
    let limit = LIMIT_SECONDS.to_string();
    let mut command = vec![
        "exec",
        POD,
        "--",
        "/bin/timeout",
        &limit,
        "/bin/io",
        &seconds,
    ];
    command.extend(work.iter().map(|(_, words)| words.as_str()));
    let mut io = ctl
        .command(&command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start kuasar-ctl");
    let mut names = work.iter().map(|(name, _)| name);
    let mut before = Spent::default();
    let lines = BufReader::new(io.stdout.take().expect("stdout is piped")).lines();
    for line in lines.map_while(Result::ok) {
        match line.split_once(' ') {
            None if line == "accept" => connect(&daemon, &ctl),
            None if line == "begin" => before = Spent::now(&daemon, &ctl),
            Some(("end", figures)) => {
                let after = Spent::now(&daemon, &ctl);
                let name = names.next().expect("as many ends as there is work");
                add(report, backend, name, figures, &before, &after);
            }
            _ => panic!("{line:?}"),
        }
    }
    let ended = io.wait().expect("wait for kuasar-ctl");
    if !ended.success() {
        let done = format!("{}: ended early: {ended}", backend.name);
        report.skipped.push(done);
    }
    ctl.run(["rm", "--force", POD]).expect_code(0);
}

/// The peer's part, as the guest's program has it.
fn serve(mut stream: impl Read + Write) -> std::io::Result<()> {
    let mut part = [0];
    stream.read_exact(&mut part)?;
    let mut buffer = vec![7; 256 << 10];
    loop {
        let bytes = match part {
            [b's'] => buffer.len(),
            _ => stream.read(&mut buffer)?,
        };
        if bytes == 0 {
            return Ok(());
        }
        if part != [b'd'] {
            stream.write_all(buffer.get(..bytes).unwrap_or_default())?;
        }
    }
}

/// Connects to the guest's vsock port, and serves it.
fn connect(daemon: &Daemon, ctl: &Ctl) {
    let id = inspect(ctl)
        .pointer("/pod/id")
        .and_then(Value::as_str)
        .map(str::to_owned);
    let socket = daemon.state_dir().join(id.expect("the pod's id"));
    let mut stream = UnixStream::connect(socket.join("vsock.sock")).expect("connect to the guest");
    thread::spawn(move || -> std::io::Result<()> {
        stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes())?;
        let mut byte = [0];
        while byte != *b"\n" {
            stream.read_exact(&mut byte)?;
        }
        serve(stream)
    });
}

fn inspect(ctl: &Ctl) -> Value {
    let shown = ctl.run(["inspect", "--json", POD]);
    serde_json::from_str(&shown.expect_code(0).stdout).expect("JSON")
}

/// What the host did for the pod so far.
#[derive(Debug, Default)]
struct Spent {
    cpu_us: f64,
    /// Exits to the VMM; `None` where it does not count them.
    exits: Option<f64>,
}

impl Spent {
    fn now(daemon: &Daemon, ctl: &Ctl) -> Self {
        let exits = inspect(ctl);
        let exits = exits.pointer("/status/vm/exits").and_then(Value::as_object);
        let exits = exits.filter(|exits| !exits.is_empty());
        let sum =
            |exits: &serde_json::Map<String, Value>| exits.values().filter_map(Value::as_f64).sum();
        let pids = backend::processes(daemon);
        let times = pids.iter().filter_map(|pid| cpu_time(*pid).ok());
        Self {
            cpu_us: times.map(|time| time.as_secs_f64() * 1e6).sum(),
            exits: exits.map(sum),
        }
    }
}

/// Adds what one kind of work came to: "OPERATIONS NANOSECONDS P50 P99".
fn add(
    report: &mut Report,
    backend: &Backend,
    name: &str,
    figures: &str,
    before: &Spent,
    after: &Spent,
) {
    let figures: Vec<f64> = figures
        .split(' ')
        .map(|n| n.parse().expect("a number"))
        .collect();
    let [operations, ns, p50, p99] = figures[..] else {
        panic!("{figures:?}");
    };
    println!("  {name}: {operations} in {:.1} s", ns / 1e9);
    let mut figure = |what: &str, unit, value| {
        report.add(backend.name, &format!("{name}: {what}"), unit, vec![value]);
    };
    figure("rate", "/s", operations / (ns / 1e9));
    figure("time, median", "us", p50 / 1e3);
    figure("time, p99", "us", p99 / 1e3);
    let cpu = after.cpu_us - before.cpu_us;
    figure("host CPU each", "us", cpu / operations);
    if let (Some(before), Some(after)) = (before.exits, after.exits) {
        figure("exits each", "", (after - before) / operations);
    }
}
