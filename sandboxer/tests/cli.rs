//! `kuasar-ctl` as a process, as far as it goes without a virtual machine.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A CLI with folders of its own and no daemon.
struct Ctl {
    dir: tempfile::TempDir,
}

impl Ctl {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn run(&self, args: &[&str]) -> Output {
        let at = |name: &str| self.path().join(name);
        Command::new(env!("CARGO_BIN_EXE_kuasar-ctl"))
            .env("KUASAR_CTL_DIR", at("ctl"))
            .env("KUASAR_CACHE_DIR", at("cache"))
            .env("KUASAR_ADDRESS", at("nobody.sock"))
            .env("KUASAR_STATE_DIR", at("state"))
            .env_remove("RUST_LOG")
            .args(args)
            .output()
            .unwrap()
    }

    /// Fails with 125; what it says on stderr.
    #[track_caller]
    fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{args:?}: {text}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(
            !text.contains('\u{1b}'),
            "no colours without a terminal: {text}"
        );
        let pods = fs::read_dir(self.path().join("ctl/pods"));
        let left = pods.into_iter().flatten().flatten();
        let left: Vec<_> = left
            .map(|e| e.file_name())
            .filter(|n| n != ".lock")
            .collect();
        assert!(left.is_empty(), "{args:?} left {left:?}");
        text
    }

    #[track_caller]
    fn printed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn every_command_explains_itself_with_examples() {
    let ctl = Ctl::new();
    let top = ctl.printed(&["--help"]);
    assert!(top.contains("Exit codes:") && top.contains("124"), "{top}");
    for command in [
        "run",
        "exec",
        "ps",
        "inspect",
        "logs",
        "stop",
        "rm",
        "check",
        "completions",
        "man",
    ] {
        let help = ctl.printed(&[command, "--help"]);
        assert!(help.contains("Examples:"), "{command}: {help}");
        assert!(top.contains(command), "{command}");
    }
    assert!(
        ctl.printed(&["guest", "build", "--help"])
            .contains("Examples:")
    );
    assert!(ctl.printed(&["--version"]).starts_with("kuasar-ctl "));
    // What a command is for is not what its options are for.
    let run = ctl.printed(&["run", "--help"]);
    assert!(
        run.starts_with("Runs a container in a fresh microVM"),
        "{run}"
    );
}

#[test]
fn wrong_arguments_are_named() {
    let ctl = Ctl::new();
    let root = ctl.path().to_str().unwrap();
    for (args, named) in [
        (vec!["nonsense"], "nonsense"),
        (vec!["run"], "IMAGE"),
        (
            vec!["run", "--rootfs", root, "--memory", "0", "--", "x"],
            "--memory",
        ),
        (
            vec!["run", "--rootfs", root, "--cpus", "0", "--", "x"],
            "--cpus",
        ),
        (
            vec!["run", "--rootfs", root, "--cpus", "1000", "--", "x"],
            "255",
        ),
        (
            vec!["run", "--rootfs", root, "-v", "/no/such:/x", "--", "x"],
            "/no/such",
        ),
        (
            vec!["run", "--rootfs", root, "-v", "/tmp:relative", "--", "x"],
            "relative",
        ),
        (
            vec!["run", "--rootfs", root, "--timeout", "never", "--", "x"],
            "--timeout",
        ),
        (
            vec!["run", "--rootfs", root, "--name", "a/b", "--", "x"],
            "--name",
        ),
        (
            vec!["run", "--rootfs", root, "--env-file", "/no/file", "--", "x"],
            "/no/file",
        ),
        (
            vec!["run", "--rootfs", root, "--user", "nobody-here", "--", "x"],
            "nobody-here",
        ),
        (vec!["exec", "pod"], "COMMAND"),
    ] {
        let text = ctl.refused(&args);
        assert!(text.contains(named), "{args:?}: {text}");
    }
}

#[test]
fn roots_and_images_that_cannot_be_used_say_why() {
    let ctl = Ctl::new();
    let file = ctl.path().join("file");
    fs::write(&file, "no image").unwrap();
    let file = file.to_str().unwrap();
    for (args, why) in [
        (
            vec!["run", "--rootfs", "/no/such/folder", "--", "x"],
            "No such file or directory",
        ),
        (
            vec!["run", "--rootfs", file, "--", "x"],
            "neither a folder nor a disk",
        ),
        (vec!["run", "/no/such/image", "--", "x"], "does not exist"),
        (vec!["run", file, "--", "x"], "is not an image"),
        (
            vec!["run", ctl.path().to_str().unwrap(), "--", "x"],
            "is not an image",
        ),
        (
            vec!["run", "--rootfs", ctl.path().to_str().unwrap()],
            "pass one after --",
        ),
    ] {
        let text = ctl.refused(&args);
        assert!(
            text.contains(why) && text.contains("try:"),
            "{args:?}: {text}"
        );
    }
}

#[test]
fn a_detached_pod_needs_a_daemon() {
    let ctl = Ctl::new();
    let root = ctl.path().to_str().unwrap();
    let text = ctl.refused(&["run", "-d", "--rootfs", root, "--", "/x"]);
    assert!(
        text.contains("nobody.sock") && text.contains("vmm-sandboxer"),
        "{text}"
    );
}

#[test]
fn without_pods_there_is_nothing_to_find() {
    let ctl = Ctl::new();
    assert_eq!(ctl.printed(&["ps", "--json"]), "[]\n");
    assert!(ctl.printed(&["ps"]).starts_with("POD"));
    assert_eq!(ctl.printed(&["ps", "-q"]), "");
    for args in [
        vec!["exec", "lost", "--", "x"],
        vec!["inspect", "lost"],
        vec!["logs", "lost"],
        vec!["stop", "lost"],
        vec!["rm", "lost"],
    ] {
        let output = ctl.run(&args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{args:?}");
        assert!(text.contains("no pod is called lost"), "{args:?}: {text}");
    }
}

#[test]
fn check_tells_what_the_host_can_do() {
    let ctl = Ctl::new();
    let output = ctl.run(&["check", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ok = report["ok"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!ok)));
    let items = report["items"].as_array().unwrap();
    assert!(items.len() > 5);
    for item in items {
        let missing = item["verdict"] == "missing";
        assert!(!(missing && ok), "{item}");
        assert_eq!(item["fix"].is_null(), item["verdict"] == "ok", "{item}");
    }
    let human = ctl.run(&["check"]);
    assert_eq!(human.status.code(), output.status.code());
    assert!(!String::from_utf8(human.stdout).unwrap().contains('\u{1b}'));
}

#[test]
fn shells_and_manuals_are_served() {
    let ctl = Ctl::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(ctl.printed(&["completions", shell]).contains("kuasar-ctl"));
    }
    let dir = ctl.path().join("man");
    fs::create_dir(&dir).unwrap();
    ctl.printed(&["man", dir.to_str().unwrap()]);
    assert!(dir.join("kuasar-ctl-run.1").is_file());
}

#[test]
fn a_guest_that_was_not_built_is_no_surprise() {
    let ctl = Ctl::new();
    let text = ctl.refused(&["guest", "info"]);
    assert!(text.contains("kuasar-ctl guest build"), "{text}");
    let text = ctl.refused(&["guest", "build", "--agent", "/no/such/agent"]);
    assert!(text.contains("/no/such/agent"), "{text}");
}
