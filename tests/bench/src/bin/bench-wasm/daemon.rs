//! Containers through a daemon's sockets, as containerd starts them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::millis;
use bench::report::{OURS, Report};
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use nix::sys::stat::Mode;
use sandboxer::backend::wasm::WasmBackend;
use sandboxer::config::{Config, Wasm};
use sandboxer::rpc::controller::controller_client::ControllerClient;
use sandboxer::rpc::{channel, controller as rpc};
use sandboxer::server::{Server, ServerOptions};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use ttrpc::context::{Context, with_duration};

/// The longest that a call may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Measures `count` containers of one pod, one after the other, each with a root file system
/// and a fifo for its output.
pub(crate) async fn starts(count: usize, suite: &Path, scratch: &Path, report: &mut Report) {
    let backend = WasmBackend::new(Wasm {
        cache_dir: Some(scratch.join("daemon-cache")),
        ..Wasm::default()
    });
    let server = Server::start(ServerOptions {
        listen: scratch.join("daemon.sock"),
        dir: scratch.join("pods"),
        config: Config::default(),
        pods_outlive: false,
        backend: Some(Arc::new(backend.expect("an engine"))),
    })
    .await
    .expect("a daemon");
    let tasks = pod(server.address()).await;
    let bundle = bundle(suite, scratch);
    // Compiles, and keeps the program.
    run(&tasks, "first", &bundle).await;
    let (mut creates, mut starts) = (Vec::new(), Vec::new());
    let all = Instant::now();
    for n in 0..count {
        let (create, start) = run(&tasks, &format!("c{n}"), &bundle).await;
        creates.push(create);
        starts.push(start);
    }
    let rate = count as f64 / all.elapsed().as_secs_f64();
    report.add(OURS, "daemon: Create", "ms", creates);
    report.add(OURS, "daemon: Start to first output", "ms", starts);
    report.add(OURS, "daemon: lives per second", "1/s", vec![rate]);
    server.shutdown(LIMIT).await;
}

async fn pod(address: &Path) -> TaskClient {
    let channel = channel(address).await.expect("a connection");
    let mut client = ControllerClient::new(channel);
    let sandbox_id = "bench".to_owned();
    let create = rpc::ControllerCreateRequest {
        sandbox_id: sandbox_id.clone(),
        ..Default::default()
    };
    client.create(create).await.expect("a pod");
    let start = rpc::ControllerStartRequest {
        sandbox_id,
        ..Default::default()
    };
    let started = client.start(start).await.expect("a pod").into_inner();
    let socket = started.address.trim_start_matches("ttrpc+");
    let client = ttrpc::asynchronous::Client::connect(socket).await;
    TaskClient::new(client.expect("a connection"))
}

fn bundle(suite: &Path, scratch: &Path) -> PathBuf {
    let bundle = scratch.join("bundle");
    std::fs::create_dir_all(bundle.join("rootfs")).expect("a bundle");
    std::fs::copy(suite, bundle.join("rootfs/suite.wasm")).expect("a program");
    let spec = r#"{"ociVersion": "1.1.0", "root": {"path": "rootfs"},
        "process": {"args": ["/suite.wasm", "hello"], "cwd": "/"}}"#;
    std::fs::write(bundle.join("config.json"), spec).expect("a spec");
    nix::unistd::mkfifo(&bundle.join("stdout"), Mode::S_IRWXU).expect("a fifo");
    bundle
}

fn context() -> Context {
    with_duration(LIMIT)
}

/// A container's whole life: how long its Create took, and its Start until it wrote.
async fn run(tasks: &TaskClient, id: &str, bundle: &Path) -> (f64, f64) {
    let stdout = bundle.join("stdout");
    let reader = pipe::OpenOptions::new().open_receiver(&stdout);
    let mut reader = reader.expect("a fifo");
    let (id, stdout) = (id.to_owned(), stdout.display().to_string());
    let create = api::CreateTaskRequest {
        id: id.clone(),
        bundle: bundle.display().to_string(),
        stdout,
        ..Default::default()
    };
    let begin = Instant::now();
    let created = tasks.create(context(), &create).await;
    created.expect("a container");
    let created = millis(begin.elapsed());
    let start = api::StartRequest {
        id: id.clone(),
        ..Default::default()
    };
    let begin = Instant::now();
    let mut first = [0];
    let (started, read) = tokio::join!(
        tasks.start(context(), &start),
        reader.read_exact(&mut first)
    );
    started.expect("a start");
    read.expect("output");
    let started = millis(begin.elapsed());
    let wait = api::WaitRequest {
        id: id.clone(),
        ..Default::default()
    };
    tasks.wait(context(), &wait).await.expect("its end");
    let delete = api::DeleteRequest {
        id,
        ..Default::default()
    };
    tasks.delete(context(), &delete).await.expect("its removal");
    (created, started)
}
