//! What a container's mounts and terminal are to its program.

use super::*;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

#[tokio::test(flavor = "multi_thread")]
async fn mounts_and_a_read_only_root_keep_their_modes() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(settings()).await;
    let tasks = daemon.pod("p1").await;
    let dir = tempfile::tempdir().unwrap();
    let host = |name: &str| dir.path().join(name);
    for folder in ["data", "config"] {
        std::fs::create_dir(host(folder)).unwrap();
    }
    std::fs::write(host("config/key"), "value").unwrap();
    std::fs::write(host("app.conf"), "single").unwrap();
    std::fs::write(host("last-words"), "").unwrap();
    let bind = |name: &str, destination: &str, mode: &str| {
        json!({"destination": destination, "type": "bind", "source": host(name),
            "options": ["rbind", mode]})
    };
    let mounts = json!([
        bind("data", "/data", "rw"),
        bind("config", "/config", "ro"),
        bind("app.conf", "/etc/app.conf", "ro"),
        bind("last-words", "/dev/termination-log", "rw"),
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m"]},
    ]);
    let mut n = 0;
    let mut run = async |args: &[&str], read_only: bool| {
        n += 1;
        let id = format!("c{n}");
        let spec = json!({
            "process": process(args), "mounts": mounts,
            "root": {"path": "rootfs", "readonly": read_only},
        });
        let out = tasks.create_with(&id, &spec).await.unwrap();
        tasks.run_created(&id, &out).await
    };
    for (args, read_only, code) in [
        (["put", "/new", "x"], false, 0),
        (["put", "/new", "x"], true, 1),
        (["put", "/data/new", "x"], true, 0),
        (["put", "/config/key", "x"], false, 1),
        (["put", "/config/new", "x"], false, 1),
        (["put", "/etc/app.conf", "x"], false, 1),
        (["put", "/tmp/new", "x"], false, 0),
        (["put", "/tmp/new", "x"], true, 0),
        (["put", "/dev/termination-log", "the end"], false, 0),
    ] {
        let (ended, out) = run(&args, read_only).await;
        assert_eq!(ended, code, "{args:?}, read-only root {read_only}: {out}");
    }
    assert_eq!(run(&["get", "/config/key"], true).await.1, "value");
    assert_eq!(run(&["get", "/etc/app.conf"], true).await.1, "single");
    let read = |name: &str| std::fs::read_to_string(host(name)).unwrap();
    assert_eq!(
        (read("data/new"), read("last-words")),
        ("x".into(), "the end".into())
    );
    assert!(!host("tmp").exists());
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_echoes_and_interrupts() {
    harness::skip_if!(missing());
    let daemon = Daemon::start(settings()).await;
    let tasks = daemon.pod("p1").await;
    // For the bundle.
    tasks
        .create("tty", process(&["exit", "0"]), json!({}))
        .await
        .unwrap();
    tasks.start("tty", "").await.unwrap();
    tasks.wait("tty", "").await;
    tasks.delete("tty", "").await;
    let bundle = tasks.root.join("tty");
    let mut process = process(&["spin"]);
    process["terminal"] = json!(true);
    let spec = json!({"process": process, "root": {"path": "rootfs"}});
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let [stdin, stdout] = ["stdin", "stdout"].map(|name| {
        let path = bundle.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    });
    let mut shown = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let request = api::CreateTaskRequest {
        id: "tty".to_owned(),
        bundle: bundle.to_str().unwrap().to_owned(),
        terminal: true,
        stdin: stdin.to_str().unwrap().to_owned(),
        stdout: stdout.to_str().unwrap().to_owned(),
        ..Default::default()
    };
    tasks.client.create(context(), &request).await.unwrap();
    tasks.start("tty", "").await.unwrap();
    let resize = api::ResizePtyRequest {
        id: "tty".to_owned(),
        width: 100,
        height: 30,
        ..Default::default()
    };
    tasks.client.resize_pty(context(), &resize).await.unwrap();
    let mut typing = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    let mut text = String::new();
    while !text.contains("spinning\r\n") {
        text.push(char::from(shown.read_u8().await.unwrap()));
    }
    typing.write_all(b"typed\r\x03").await.unwrap();
    assert_eq!(tasks.wait("tty", "").await, 130, "{text}");
    shown.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("typed\r\n"), "echoed: {text:?}");
    daemon.end().await;
}
