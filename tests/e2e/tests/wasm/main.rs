//! `wasm-sandboxer` as users meet it: by `kuasar-ctl` and under containerd.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

mod containerd;

use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::ctl::Ctl;
use harness::daemon::Daemon;
use harness::leftovers::Held;
use harness::pty::OnPty;
use harness::{skip_if, wasm};
use serde_json::json;
use sha2::{Digest, Sha256};

/// A daemon for WebAssembly pods, a CLI on it and a folder with programs.
struct World {
    ctl: Ctl,
    before: Held,
    daemon: Daemon,
    scratch: tempfile::TempDir,
}

impl World {
    fn new(config: &str) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let cache = scratch.path().join("cache");
        let config = format!("[wasm]\ncache_dir = {cache:?}\n{config}");
        let daemon = Daemon::start_program("wasm-sandboxer", &config);
        let ctl = Ctl::new(&daemon);
        let before = Held::by(&daemon);
        Self {
            ctl,
            before,
            daemon,
            scratch,
        }
    }

    fn program(&self, name: &str, bytes: &[u8]) -> PathBuf {
        wasm::file(self.scratch.path(), name, bytes)
    }
}

/// The longest that anything here takes.
const SOON: Duration = Duration::from_secs(30);

/// Why these tests cannot run here.
fn missing() -> Option<String> {
    wasm::clang_missing()
        .or_else(|| (!nix::unistd::geteuid().is_root()).then(|| "mounting needs root".to_owned()))
}

#[test]
fn the_cli_runs_programs() {
    skip_if!(missing());
    let world = World::new("");
    let suite = world.program("suite.wasm", &wasm::suite());
    let suite = suite.to_str().unwrap();
    let run = |args: &[&str]| world.ctl.run(args);
    let done = run(&["run", suite, "--", "args", "a b"]);
    assert_eq!(done.expect_code(0).stdout, "/suite.wasm\nargs\na b\n");
    run(&["run", suite, "--", "exit", "77"]).expect_code(77);
    let done = run(&["run", suite, "--", "say", "out", "err"]);
    assert_eq!(
        (done.stdout.as_str(), done.stderr.as_str()),
        ("out\n", "err\n")
    );
    let done = world
        .ctl
        .run_with_stdin(["run", "-i", suite, "--", "cat"], b"piped");
    assert_eq!(done.expect_code(0).stdout, "piped");
    let text = "(module (func (export \"_start\") unreachable))";
    let text = world.program("trap.wat", text.as_bytes());
    let done = run(&["run", text.to_str().unwrap()]);
    assert!(
        done.expect_code(134).stderr.contains("unreachable"),
        "{done:?}"
    );

    // Volumes keep their mode; limits are kept.
    let data = world.scratch.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    run(&["run", "-v", &volume, suite, "--", "put", "/data/new", "x"]).expect_code(0);
    assert_eq!(std::fs::read_to_string(data.join("new")).unwrap(), "x");
    let volume = format!("{volume}:ro");
    run(&["run", "-v", &volume, suite, "--", "put", "/data/new", "y"]).expect_code(1);
    let done = run(&["run", "--memory", "16MiB", suite, "--", "eat", "100"]);
    assert!(done.expect_code(3).stdout.contains("refused"), "{done:?}");
    let done = run(&["run", "--timeout", "1s", suite, "--", "spin"]);
    assert_eq!(done.code, Some(124), "{done:?}");

    // A terminal, if the CLI has one.
    let mut pty = OnPty::spawn(
        world.ctl.command(["run", "-it", suite, "--", "cat"]),
        30,
        100,
    );
    pty.type_in("typed\n");
    pty.wait_for("typed\r\ntyped\r\n", SOON);
    pty.type_in("\x03");
    assert_eq!(pty.finish(SOON), Some(130), "{}", pty.shown);

    // What cannot run says why.
    let broken = world.program("broken.wasm", b"\0asm\x01\0\0\0\xff");
    let done = run(&["run", broken.to_str().unwrap()]);
    assert!(
        done.expect_code(126)
            .stderr
            .contains("no valid WebAssembly"),
        "{done:?}"
    );

    // One that stays, seen and entered.
    let done = run(&["run", "-d", "--name", "web", suite, "--", "sleep", "3600"]);
    done.expect_code(0);
    assert!(run(&["ps"]).stdout.contains("web"));
    let done = run(&["exec", "web", "--", "/suite.wasm", "exit", "5"]);
    done.expect_code(5);
    run(&["stop", "web"]).expect_code(0);
    run(&["rm", "-f", "web"]).expect_code(0);
    world.before.assert_back(&world.daemon);
}

/// An OCI layout with a Wasm artifact, as `wkg` and others push it, or another of type `media`.
fn artifact(dir: &Path, name: &str, program: &[u8], media: &str) -> PathBuf {
    let layout = dir.join(name);
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |content: &[u8], media: &str| {
        let digest = Sha256::digest(content);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(blobs.join(&digest), content).unwrap();
        json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": content.len()})
    };
    let config = json!({"architecture": "wasm", "os": "wasip1", "layerDigests": []}).to_string();
    let config = put(config.as_bytes(), "application/vnd.wasm.config.v0+json");
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [put(program, media)],
    });
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest = put(manifest.to_string().as_bytes(), media);
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    layout
}

#[test]
fn artifacts_and_images_hold_programs() {
    skip_if!(missing());
    let world = World::new("");
    let images = world.scratch.path().join("images");
    let ctl = world.ctl.clone().env("KUASAR_CACHE_DIR", images);
    let run = |name: &str, media: &str| {
        let layout = artifact(world.scratch.path(), name, &wasm::suite(), media);
        ctl.run(["run", layout.to_str().unwrap(), "--", "args"])
    };
    let done = run("layout", "application/wasm");
    assert_eq!(done.expect_code(0).stdout, "/app.wasm\nargs\n");
    let done = run("other", "application/vnd.acme.rocket");
    assert_ne!(done.code, Some(0));
    assert!(
        done.stderr.contains("no WebAssembly program")
            && done.stderr.contains("application/vnd.acme.rocket"),
        "{done:?}"
    );

    let layer = harness::image::Layer::new().file("bin/suite.wasm", 0o644, &wasm::suite());
    let config = json!({
        "Entrypoint": ["/bin/suite.wasm"], "Cmd": ["env"], "Env": ["FROM_IMAGE=yes"],
    });
    let image = harness::image::Image::new([layer], &config);
    let archive = image.oci_archive(&world.scratch.path().join("image.tar"));
    let done = ctl.run(["run", archive.to_str().unwrap()]);
    let stdout = &done.expect_code(0).stdout;
    assert!(stdout.contains("FROM_IMAGE=yes\n"), "{stdout}");
    world.before.assert_back(&world.daemon);
}

#[test]
fn the_cli_needs_no_daemon() {
    skip_if!(missing());
    let scratch = tempfile::tempdir().unwrap();
    let suite = wasm::file(scratch.path(), "suite.wasm", &wasm::suite());
    let done = std::process::Command::new(harness::bin_dir().join("kuasar-ctl"))
        .arg("--address")
        .arg(scratch.path().join("none.sock"))
        .env("KUASAR_CACHE_DIR", scratch.path().join("cache"))
        .arg("run")
        .arg(suite)
        .args(["--", "say", "alone", ""])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "alone\n");
}
