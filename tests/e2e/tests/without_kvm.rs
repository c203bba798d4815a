//! What users are told where `/dev/kvm` cannot be used: what is wrong, and what to do.
//!
//! Each program runs in a mount namespace of its own whose `/dev` holds what the case needs, so
//! nothing of the host changes, and the host itself need not have KVM.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use harness::{bin_dir, skip_if};
use serde_json::Value;

/// What is at `/dev/kvm`, and what the messages must hold.
struct Case {
    /// Makes `/dev/kvm` in an empty `/dev`.
    make: &'static str,
    /// Runs the program.
    exec: &'static str,
    wrong: &'static str,
    fix: &'static str,
}

const AS_ROOT: &str = r#"exec "$@""#;
const AS_NOBODY: &str = r#"exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@""#;

/// The null device stands for a KVM where the node must open or must be refused.
const CASES: [Case; 6] = [
    Case {
        make: "true",
        exec: AS_ROOT,
        wrong: "/dev/kvm does not exist",
        fix: "modprobe kvm_intel or kvm_amd",
    },
    Case {
        make: "mknod /dev/kvm c 1 3 && mount -o remount,nodev /dev",
        exec: AS_ROOT,
        wrong: "/dev/kvm may not be opened: permission denied",
        fix: "--device /dev/kvm",
    },
    Case {
        make: "mknod -m 600 /dev/kvm c 1 3",
        exec: AS_NOBODY,
        wrong: "/dev/kvm may not be opened: permission denied",
        fix: "run as root",
    },
    Case {
        // 60 is reserved for experiments: no driver has it.
        make: "mknod /dev/kvm c 60 0",
        exec: AS_ROOT,
        wrong: "/dev/kvm exists, but no KVM is behind it",
        fix: "modprobe kvm_intel or kvm_amd",
    },
    Case {
        make: "mknod /dev/kvm c 1 3",
        exec: AS_ROOT,
        wrong: "/dev/kvm is not KVM's device",
        fix: "remove what is there",
    },
    Case {
        make: "echo text > /dev/kvm",
        exec: AS_ROOT,
        wrong: "/dev/kvm is not KVM's device",
        fix: "remove what is there",
    },
];

/// Why no namespace can be made here.
fn no_namespaces() -> Option<String> {
    let tried = Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg("mount -t tmpfs none /dev && mknod /dev/x c 1 3 && command -v setpriv")
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "cannot make a /dev of its own: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("cannot run unshare of util-linux: {error}")),
    }
}

/// The binaries and a folder to write to, for any user.
struct Place {
    scratch: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let place = Self { scratch };
        fs::set_permissions(place.scratch.path(), Permissions::from_mode(0o777)).unwrap();
        for program in ["kuasar-ctl", "vmm-sandboxer"] {
            fs::copy(bin_dir().join(program), place.path(program)).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, case: &Case, program: &str, args: &[&str]) -> Output {
        let (make, exec) = (case.make, case.exec);
        let script = format!("mount -t tmpfs none /dev && {{ {make}; }} && {exec}");
        Command::new("unshare")
            .args(["--mount", "sh", "-c", &script, "sh"])
            .arg(self.path(program))
            .args(args)
            .env("KUASAR_CTL_DIR", self.path("ctl"))
            .env("KUASAR_CACHE_DIR", self.path("cache"))
            .env("KUASAR_ADDRESS", self.path("nobody.sock"))
            .env_remove("RUST_LOG")
            .current_dir("/")
            .output()
            .unwrap()
    }

    /// Fails the test unless `output` is one line that says what is wrong and one what to do.
    #[track_caller]
    fn assert_told(&self, case: &Case, program: &str, code: i32, output: &Output) {
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{}: {text}", case.make);
        assert!(output.stdout.is_empty(), "{}", case.make);
        let lines: Vec<&str> = text.lines().collect();
        let wrong = format!("{program}: this host cannot run microVMs: {}", case.wrong);
        assert_eq!(lines[0], wrong);
        assert!(
            lines.len() == 2 && lines[1].starts_with("  try: ") && lines[1].contains(case.fix),
            "{text}"
        );
    }
}

#[test]
fn run_and_the_daemon_say_what_is_wrong_and_leave_nothing() {
    skip_if!(no_namespaces());
    for case in &CASES {
        let place = Place::new();
        let root = place.path("root");
        fs::create_dir(&root).unwrap();
        let root = root.to_str().unwrap();
        let run = place.run(case, "kuasar-ctl", &["run", "--rootfs", root, "--", "/x"]);
        place.assert_told(case, "kuasar-ctl", 125, &run);
        let pods = fs::read_dir(place.path("ctl/pods")).into_iter().flatten();
        assert_eq!(pods.count(), 0, "a pod remains");
        let daemons = fs::read_dir(place.path("ctl/embedded")).unwrap();
        assert_eq!(
            daemons.count(),
            0,
            "the folder of an embedded daemon remains"
        );

        let (socket, state) = (place.path("daemon.sock"), place.path("state"));
        let listen = ["--listen", socket.to_str().unwrap()];
        let dir = ["--dir", state.to_str().unwrap()];
        let daemon = place.run(case, "vmm-sandboxer", &[listen, dir].concat());
        place.assert_told(case, "vmm-sandboxer", 1, &daemon);
        assert!(!socket.exists(), "a socket remains");
    }
}

#[test]
fn check_names_the_same_faults() {
    skip_if!(no_namespaces());
    let place = Place::new();
    for case in &CASES {
        let human = place.run(case, "kuasar-ctl", &["check"]);
        let text = String::from_utf8(human.stdout).unwrap();
        assert_eq!(human.status.code(), Some(1), "{text}");
        assert!(human.stderr.is_empty(), "{text}");
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        assert_eq!(first, format!("missing {:<14}{}", "kvm", case.wrong));
        let second = lines.next().unwrap_or_default().trim_start();
        assert!(
            second.starts_with("try: ") && second.contains(case.fix),
            "{text}"
        );
        assert!(
            text.ends_with("\nThis host cannot run pods yet.\n"),
            "{text}"
        );

        let json = place.run(case, "kuasar-ctl", &["check", "--json"]);
        assert_eq!(json.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(report["ok"], false);
        assert!(report["emulated_ring0"].is_null(), "{report}");
        let kvm = &report["items"][0];
        assert_eq!(
            (&kvm["name"], &kvm["verdict"], &kvm["found"]),
            (&"kvm".into(), &"missing".into(), &case.wrong.into())
        );
        assert!(kvm["fix"].as_str().unwrap().contains(case.fix), "{kvm}");
    }
}

#[test]
fn a_daemon_that_may_not_make_its_folder_says_so() {
    skip_if!(no_namespaces());
    let place = Place::new();
    let case = &CASES[2];
    let closed = place.path("closed");
    fs::create_dir(&closed).unwrap();
    let dir = closed.join("state");
    let output = place.run(case, "vmm-sandboxer", &["--dir", dir.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains(dir.to_str().unwrap()) && text.ends_with("\n  try: run as root\n"),
        "{text}"
    );
}
