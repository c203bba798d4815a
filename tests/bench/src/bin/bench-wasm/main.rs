//! What WebAssembly containers cost: compiling, starting, staying, serving; beside wasmtime's
//! CLI, a process each, and WasmEdge where it is installed.
#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    reason = "a benchmark reports its failures by panicking"
)]

mod daemon;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as Pipes};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::memory::pss;
use bench::millis;
use bench::report::{OURS, Report};
use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wasm_host::{
    CacheConfig, Container, Host, HostConfig, Lane, LaneConfig, Process, Program, Settings, Stdio,
};

/// Measures WebAssembly containers in this process, beside a process for each.
#[derive(Debug, Parser)]
struct Args {
    /// Starts, one after the other
    #[arg(long, default_value_t = 300)]
    starts: usize,
    /// Starts of each peer
    #[arg(long, default_value_t = 30)]
    peer_starts: usize,
    /// Instances that stay
    #[arg(long, default_value_t = 1000)]
    instances: usize,
    /// Seconds of requests
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

const COMPILE: &str = "compile, nothing cached";
const LOAD: &str = "load from the cache on disk";
const START: &str = "start to first output, cached";
const RATE: &str = "starts per second";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let args = Args::parse();
    if let Some(why) = harness::wasm::clang_missing() {
        println!("skipped: {why}");
        return;
    }
    let mut report = Report::without_vms("wasm", "no virtual machines");
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let suite = harness::wasm::file(scratch.path(), "suite.wasm", &harness::wasm::suite());
    let host = compile(&suite, scratch.path(), &mut report).await;
    let lane = Lane::start(LaneConfig::default()).expect("a lane");
    let program = host.load(&suite).await.expect("a program");
    starts(&args, &host, &lane, &program, &mut report).await;
    daemon::starts(args.starts, &suite, scratch.path(), &mut report).await;
    density(&args, &host, &lane, &program, &mut report).await;
    http(&args, &host, &program, &mut report).await;
    peers(&args, &suite, scratch.path(), &mut report);
    report.print();
    println!(
        "\nwritten to {}",
        report.write().expect("write the JSON file").display()
    );
}

fn settings(args: &[&str]) -> Settings {
    let args = std::iter::once("suite").chain(args.iter().copied());
    Settings {
        args: args.map(str::to_owned).collect(),
        ..Settings::default()
    }
}

/// Measures the way from a file to a program, and gives a host that has it cached.
async fn compile(suite: &Path, scratch: &Path, report: &mut Report) -> Host {
    let config = |n: usize| HostConfig {
        cache: Some(CacheConfig {
            dir: scratch.join(format!("cache{n}")),
            key: scratch.join("key"),
            max_bytes: 1 << 30,
        }),
        ..HostConfig::default()
    };
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for n in 0..3 {
        for samples in [&mut cold, &mut warm] {
            let host = Host::new(config(n)).expect("an engine");
            let begin = Instant::now();
            host.load(suite).await.expect("a program");
            samples.push(millis(begin.elapsed()));
        }
    }
    report.add(OURS, COMPILE, "ms", cold);
    report.add(OURS, LOAD, "ms", warm);
    Host::new(config(0)).expect("an engine")
}

async fn starts(
    args: &Args,
    host: &Host,
    lane: &Lane,
    program: &Arc<Program>,
    report: &mut Report,
) {
    let mut samples = Vec::new();
    let all = Instant::now();
    for _ in 0..args.starts {
        let begin = Instant::now();
        let (mut reader, stdout) = tokio::io::duplex(4096);
        let stdio = Stdio {
            stdout: Some(Box::new(stdout)),
            ..Stdio::default()
        };
        let container = host.container(settings(&["hello"]));
        let process = container
            .start(lane, program, stdio)
            .await
            .expect("a start");
        reader.read_u8().await.expect("output");
        samples.push(millis(begin.elapsed()));
        assert_eq!(process.wait().await.code, 0);
    }
    let rate = args.starts as f64 / all.elapsed().as_secs_f64();
    report.add(OURS, START, "ms", samples);
    report.add(OURS, RATE, "1/s", vec![rate]);
}

/// As many instances as wanted, all idle in a host call.
async fn density(
    args: &Args,
    host: &Host,
    lane: &Lane,
    program: &Arc<Program>,
    report: &mut Report,
) {
    let before = total_kib();
    let begin = Instant::now();
    let mut running: Vec<(Container, Process)> = Vec::new();
    for _ in 0..args.instances {
        let container = host.container(settings(&["sleep", "3600"]));
        let process = container.start(lane, program, Stdio::default()).await;
        running.push((container, process.expect("a start")));
    }
    let rate = args.instances as f64 / begin.elapsed().as_secs_f64();
    // The last ones have still to come to their sleep.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let each = total_kib().saturating_sub(before) as f64 / args.instances as f64;
    report.add(OURS, "starts per second, all staying", "1/s", vec![rate]);
    report.add(OURS, "PSS of an idle instance", "KiB", vec![each]);
    for (container, _) in &running {
        container.kill();
    }
    for (_, process) in &running {
        process.wait().await;
    }
}

/// All of this process, linear memories included.
fn total_kib() -> u64 {
    let pss = pss(std::process::id(), &[]).expect("own memory");
    pss.own_kib + pss.guest_kib
}

/// Requests per second to a component, alone and beside programs that compute.
async fn http(args: &Args, host: &Host, hog: &Arc<Program>, report: &mut Report) {
    let proxy = harness::wasm::proxy();
    let proxy = host.load_bytes("proxy", &proxy).await.expect("a program");
    let lane = Lane::start(LaneConfig::default()).expect("a lane");
    let address = SocketAddr::from(([127, 0, 0, 1], 18_080));
    let container = host.container(Settings {
        http_listen: Some(address),
        ..settings(&[])
    });
    let stdio = Stdio::default();
    let server = container
        .start(&lane, &proxy, stdio)
        .await
        .expect("a server");
    let seconds = Duration::from_secs(args.seconds);
    requests(address, seconds, "HTTP", report).await;
    let other = Lane::start(LaneConfig {
        nice: 5,
        ..LaneConfig::default()
    })
    .expect("a lane");
    for (name, lane) in [
        ("HTTP, hog in another pod", &other),
        ("HTTP, hog in the same pod", &lane),
    ] {
        let spinning = host.container(settings(&["spin"]));
        let stdio = Stdio::default();
        let process = spinning.start(lane, hog, stdio).await.expect("a hog");
        requests(address, seconds, name, report).await;
        process.signal(9);
        process.wait().await;
    }
    server.signal(9);
    server.wait().await;
}

/// Requests on four connections that are kept open.
async fn requests(address: SocketAddr, time: Duration, name: &str, report: &mut Report) {
    let begin = Instant::now();
    let clients = (0..4).map(|_| {
        tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            let mut answer = vec![0; 4096];
            let mut took = Vec::new();
            while begin.elapsed() < time {
                let sent = Instant::now();
                let request = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
                stream.write_all(request).await.expect("a request");
                let mut seen = Vec::new();
                // Chunked: the last chunk has no bytes.
                while !seen.ends_with(b"0\r\n\r\n") {
                    let n = stream.read(&mut answer).await.expect("an answer");
                    assert_ne!(n, 0, "the server closed the connection");
                    seen.extend_from_slice(answer.get(..n).unwrap_or_default());
                }
                took.push(millis(sent.elapsed()));
            }
            took
        })
    });
    let mut took = Vec::new();
    for client in clients.collect::<Vec<_>>() {
        took.extend(client.await.expect("a client"));
    }
    let rate = took.len() as f64 / begin.elapsed().as_secs_f64();
    report.add(OURS, &format!("{name}: requests"), "1/s", vec![rate]);
    report.add(OURS, &format!("{name}: each"), "ms", took);
}

/// A process for each program, compiled ahead where the peer can.
fn peers(args: &Args, suite: &Path, scratch: &Path, report: &mut Report) {
    let code = scratch.join("suite.cwasm");
    let wasmtime = wasmtime();
    match wasmtime.as_deref().map(|wasmtime| {
        let begin = Instant::now();
        let compiled = output(
            Command::new(wasmtime)
                .arg("compile")
                .arg("-o")
                .arg(&code)
                .arg(suite),
        );
        report.add("wasmtime", COMPILE, "ms", vec![millis(begin.elapsed())]);
        compiled
    }) {
        Some(Ok(_)) => {
            let program = wasmtime.unwrap_or_default();
            let mut command = Command::new(&program);
            command
                .args(["run", "--allow-precompiled"])
                .arg(&code)
                .arg("hello");
            peer(args, "wasmtime", &program, command, report);
        }
        Some(Err(why)) => report.skipped.push(format!("wasmtime: {why}")),
        None => report
            .skipped
            .push("wasmtime: run scripts/wasmtime".to_owned()),
    }
    let edge = Path::new("wasmedge");
    let mut command = Command::new(edge);
    command.arg(suite).arg("hello");
    peer(args, "wasmedge", edge, command, report);
}

/// Where `scripts/wasmtime` puts it.
fn wasmtime() -> Option<PathBuf> {
    let cache = std::env::var_os("KUASAR_CACHE_DIR")
        .map_or_else(|| PathBuf::from("/var/cache/kuasar-embed"), PathBuf::from);
    let peers = std::fs::read_dir(cache.join("peers")).ok()?;
    peers
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("wasmtime-"))
        .map(|entry| entry.path().join("bin/wasmtime"))
        .find(|path| path.exists())
}

fn peer(args: &Args, name: &str, program: &Path, mut command: Command, report: &mut Report) {
    let version = match output(Command::new(program).arg("--version")) {
        Ok(version) => version.trim().to_owned(),
        Err(why) => {
            report.skipped.push(format!("{name}: {why}"));
            return;
        }
    };
    report.versions.push((name.to_owned(), version));
    let mut samples = Vec::new();
    let all = Instant::now();
    for _ in 0..args.peer_starts {
        let begin = Instant::now();
        let mut child = command.stdout(Pipes::piped()).spawn().expect("a process");
        let mut first = [0];
        let mut stdout = child.stdout.take().expect("a pipe");
        std::io::Read::read_exact(&mut stdout, &mut first).expect("output");
        samples.push(millis(begin.elapsed()));
        child.wait().expect("its end");
    }
    let rate = args.peer_starts as f64 / all.elapsed().as_secs_f64();
    report.add(name, START, "ms", samples);
    report.add(name, RATE, "1/s", vec![rate]);
}

fn output(command: &mut Command) -> Result<String, String> {
    let done = command.output().map_err(|e| e.to_string())?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    Err(String::from_utf8_lossy(&done.stderr).trim().to_owned())
}
