//! Containers from images: what an image says about its process, its layers, the writable layer
//! over them, and the commands that look at a running pod. One pod serves all of it.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use e2e::World;
use harness::ctl::Ctl;
use harness::image::{Image, Layer};
use harness::{kvm_missing, skip_if};
use serde_json::{Value, json};

/// A process in an emulated guest kernel starts slowly.
const SLOW: Duration = Duration::from_secs(300);

/// The image's entry point: tells what it was given, then waits for its stop signal.
const START: &str = r#"trap 'echo asked to stop >&2; exit 3' USR1
trap 'echo heard USR2' USR2
echo "args=$*" "greeting=$GREETING" "pwd=$(pwd)" "ids=$(id -u):$(id -g)"
echo complaint >&2
touch mine
while true; do sleep 1000000 & wait $!; done
"#;

/// Two layers: busybox and some files, then one more, one less, and one replaced.
fn image(rootfs: &Path) -> Image {
    let lower = Layer::new()
        .tree(rootfs, Path::new(""))
        .dir("data", 0o755, 0)
        .file("data/gone", 0o644, b"of the lower layer")
        .file("data/kept", 0o644, b"kept")
        .file("data/replaced", 0o644, b"old");
    let upper = Layer::new()
        .whiteout("data", "gone")
        .file("data/replaced", 0o644, b"new")
        .dir("app", 0o755, 1000)
        .file("app/start", 0o755, START.as_bytes());
    Image::new(
        [lower, upper],
        &json!({
            "Env": ["PATH=/bin", "GREETING=hello from the image"],
            "WorkingDir": "/app",
            "User": "demo",
            "Entrypoint": ["/bin/sh", "start"],
            "Cmd": ["one", "two"],
            "StopSignal": "SIGUSR1",
        }),
    )
}

/// The root file systems in a cache of images.
fn unpacked(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache.join("images")).into_iter().flatten();
    let roots = entries.map(|entry| entry.unwrap().path().join("rootfs"));
    roots.filter(|root| root.is_dir()).collect()
}

/// Every file below `root` with its mode, owner, and content or target.
fn content(root: &Path, below: &Path, into: &mut Vec<(PathBuf, u32, u32, Vec<u8>)>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        let meta = entry.metadata().unwrap();
        let bytes = if meta.is_symlink() {
            let target = fs::read_link(entry.path()).unwrap();
            target.into_os_string().into_encoded_bytes()
        } else if meta.is_file() {
            fs::read(entry.path()).unwrap()
        } else {
            content(root, &path, into);
            Vec::new()
        };
        into.push((path, meta.mode(), meta.uid(), bytes));
    }
    into.sort();
}

/// A layout, an OCI archive and a docker archive of one image unpack to the same files. No VM:
/// `--detach` without a daemon is refused once the image is there.
#[test]
fn every_form_of_an_image_unpacks_to_the_same_files() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let image = image(&harness::rootfs::busybox(scratch.path()));
    let forms = [
        image.layout(&at("layout")),
        image.oci_archive(&at("image.tar")),
        image.docker_archive(&at("saved.tar"), "example:1"),
    ];
    let mut trees = Vec::new();
    for (number, form) in forms.iter().enumerate() {
        let cache = at(&format!("cache{number}"));
        let output = harness::program("kuasar-ctl")
            .args(["run", "--detach"])
            .arg(form)
            .env("KUASAR_CACHE_DIR", &cache)
            .env("KUASAR_CTL_DIR", at("ctl"))
            .env("KUASAR_ADDRESS", at("nobody.sock"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert!(text.contains("--detach needs a running daemon"), "{text}");
        let roots = unpacked(&cache);
        assert_eq!(roots.len(), 1, "{form:?}");
        let mut tree = Vec::new();
        content(&roots[0], Path::new(""), &mut tree);
        trees.push(tree);
    }
    let names: Vec<&Path> = trees[0].iter().map(|entry| entry.0.as_path()).collect();
    for (name, there) in [
        ("data/kept", true),
        ("data/gone", false),
        ("app/start", true),
    ] {
        assert_eq!(names.contains(&Path::new(name)), there, "{name}");
    }
    assert!(
        trees[0] == trees[1],
        "the OCI archive differs from the layout"
    );
    assert!(
        trees[0] == trees[2],
        "the docker archive differs from the layout"
    );
}

#[test]
fn an_image_runs_as_it_says_and_its_pod_can_be_looked_at() {
    skip_if!(kvm_missing());
    let mut world = World::new();
    let cache = world.scratch().join("cache");
    // Of its own: `ps` shows these pods only.
    let ctl_dir = world.scratch().join("ctl");
    world.ctl = world.ctl.env("KUASAR_CACHE_DIR", cache.clone());
    world.ctl = world.ctl.env("KUASAR_CTL_DIR", ctl_dir);
    let layout = image(&world.rootfs).layout(&world.scratch().join("layout"));
    let layout = layout.to_str().unwrap();
    world
        .ctl
        .run(["run", "--detach", "--privileged", "--name", "img", layout])
        .expect_code(0);

    follow_the_output(&world.ctl);
    layers_and_the_writable_layer(&world, &cache);
    what_commands_show(&world.ctl, layout);
    a_running_pod_is_not_removed_by_accident(&world);
    the_image_chooses_the_stop_signal(&world.ctl);

    world.ctl.run(["rm", "img"]).expect_code(0);
    world.assert_nothing_left();
    let containers = fs::read_dir(cache.join("containers")).unwrap();
    assert_eq!(containers.count(), 0, "a writable layer remains");
}

/// `logs -f` shows what was written before and what is written from then on.
fn follow_the_output(ctl: &Ctl) {
    let mut follower = ctl
        .command(["logs", "--follow", "img"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(follower.stdout.take().unwrap());
    let (tell, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    assert_eq!(
        lines.recv_timeout(SLOW).unwrap(),
        "args=one two greeting=hello from the image pwd=/app ids=1000:1000"
    );
    let signal = ctl.run(["exec", "img", "--", "/bin/kill", "-USR2", "1"]);
    signal.expect_code(0);
    assert_eq!(lines.recv_timeout(SLOW).unwrap(), "heard USR2");
    assert!(follower.try_wait().unwrap().is_none(), "it follows no more");
    follower.kill().unwrap();
    follower.wait().unwrap();
}

fn layers_and_the_writable_layer(world: &World, cache: &Path) {
    let script = "cat /data/kept /data/replaced; ls /data; ls -l /app/mine | cut -d ' ' -f 1; \
                  rm /data/kept; echo changed > /data/replaced; mv /data/replaced /data/moved; \
                  mkdir /data/dir && echo x > /data/dir/x; cat /data/moved; ls /data";
    let out = world
        .ctl
        .run(["exec", "--user", "0", "img", "--", "/bin/sh", "-c", script]);
    let expected = "keptnewkept\nreplaced\n-rw-r--r--\nchanged\ndir\nmoved\n";
    assert_eq!(out.expect_code(0).stdout, expected);
    // The image itself is as it was.
    let roots = unpacked(cache);
    assert_eq!(roots.len(), 1);
    let data = roots[0].join("data");
    assert_eq!(fs::read(data.join("replaced")).unwrap(), b"new");
    assert_eq!(fs::read(data.join("kept")).unwrap(), b"kept");
    assert!(!data.join("moved").exists() && !data.join("dir").exists());
    assert!(!roots[0].join("app/mine").exists());
}

fn what_commands_show(ctl: &Ctl, layout: &str) {
    let parse = |args: &[&str]| -> Value {
        serde_json::from_str(&ctl.run(args).expect_code(0).stdout).unwrap()
    };
    let all = parse(&["ps", "--json"]);
    let pod = &all[0];
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    assert_eq!(pod["name"], "img");
    assert_eq!(pod["state"], "SANDBOX_READY");
    assert_eq!(pod["phase"], "ready");
    assert_eq!(pod["image"], layout);
    assert_eq!(pod["command"], json!(["/bin/sh", "start", "one", "two"]));
    assert_eq!(pod["vcpus"], 1);
    let containers = pod["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1, "{pod}");
    assert_eq!(containers[0]["state"], "running");
    assert!(containers[0]["exit_code"].is_null(), "{pod}");

    let everything = parse(&["inspect", "--json", "img"]);
    assert_eq!(&everything["pod"]["id"], &pod["id"]);
    assert_eq!(everything["record"]["stop_signal"], 10);
    let status = &everything["status"];
    let backend = harness::external_backend();
    let backend = backend.as_deref().unwrap_or("in-process");
    assert_eq!(status["backend"], backend);
    let kernel = status["guest"]["kernel"].as_str().unwrap();
    assert!(kernel.contains('.'), "{kernel}");
    assert!(status["vm"]["memory_bytes"].as_u64().unwrap() >= 64 << 20);
    let phases = status["vm"]["phases"].as_array().unwrap();
    let names: Vec<&str> = phases.iter().map(|p| p["name"].as_str().unwrap()).collect();
    let cloned = [
        "vm created",
        "memory mapped",
        "devices attached",
        "state restored",
        "vm built",
        "kernel entered",
        "agent ready",
        "sandbox set up",
        "container running",
    ];
    let launched = [
        "vmm running",
        "kernel entered",
        "agent ready",
        "sandbox set up",
        "container running",
    ];
    let expected: &[&str] = match backend {
        "in-process" => &cloned,
        _ => &launched,
    };
    assert_eq!(names, expected);
    for pair in phases.windows(2) {
        assert!(
            pair[0]["us"].as_u64() <= pair[1]["us"].as_u64(),
            "{phases:?}"
        );
        let exits = |phase: &Value| phase["exits"]["mmio"].as_u64().unwrap_or_default();
        assert!(exits(&pair[0]) <= exits(&pair[1]), "{phases:?}");
    }

    // What the guest's kernel says goes to the console, and nothing of it to the container's log.
    let help = "echo h > /proc/sysrq-trigger";
    ctl.run(["exec", "--user", "0", "img", "--", "/bin/sh", "-c", help])
        .expect_code(0);
    let console = ctl.run(["logs", "--console", "img"]);
    console.expect_code(0);
    assert!(console.stdout.contains("sysrq: HELP"), "{console:?}");
    let plain = ctl.run(["logs", "img"]);
    plain.expect_code(0);
    assert!(plain.stdout.starts_with("args=one two"), "{plain:?}");
    assert!(plain.stdout.ends_with("\nheard USR2\n"), "{plain:?}");
    assert_eq!(plain.stderr, "complaint\n");
}

fn a_running_pod_is_not_removed_by_accident(world: &World) {
    let refused = world.ctl.run(["rm", "img"]);
    refused.expect_code(125);
    assert_eq!(
        refused.stderr,
        "kuasar-ctl: pod img runs\n  try: `kuasar-ctl stop img` first, or `rm --force`\n"
    );
    let alive = world.ctl.run(["exec", "img", "--", "/bin/echo", "alive"]);
    assert_eq!(alive.expect_code(0).stdout, "alive\n");
}

fn the_image_chooses_the_stop_signal(ctl: &Ctl) {
    ctl.run(["stop", "--time", "200s", "img"]).expect_code(0);
    let logs = ctl.run(["logs", "img"]);
    assert_eq!(logs.expect_code(0).stderr, "complaint\nasked to stop\n");
    let all: Value = serde_json::from_str(&ctl.run(["ps", "--json"]).stdout).unwrap();
    assert_eq!(all[0]["phase"], "ended", "{all}");
    assert_eq!(all[0]["state"], "SANDBOX_NOTREADY", "{all}");
}
