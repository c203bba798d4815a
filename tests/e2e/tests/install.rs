//! What `make install` installs, where, and whether systemd takes it. No VM.
#![allow(
    clippy::expect_used,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use harness::{bin_dir, skip_if};

/// Everything below DESTDIR, with its mode; the manual has a page per command besides.
const INSTALLED: [(&str, u32); 25] = [
    ("opt/k/bin/containerd-shim-kuasar-quark-v1", 0o755),
    ("opt/k/bin/containerd-shim-kuasar-quark-v2", 0o755),
    ("opt/k/bin/containerd-shim-kuasar-vmm-v1", 0o755),
    ("opt/k/bin/containerd-shim-kuasar-vmm-v2", 0o755),
    ("opt/k/bin/containerd-shim-kuasar-wasm-v1", 0o755),
    ("opt/k/bin/containerd-shim-kuasar-wasm-v2", 0o755),
    ("opt/k/bin/kuasar-vmm-supervisor", 0o755),
    ("opt/k/bin/kuasar-ctl", 0o755),
    ("opt/k/bin/quark-sandboxer", 0o755),
    ("opt/k/bin/vmm-sandboxer", 0o755),
    ("opt/k/bin/wasm-sandboxer", 0o755),
    ("opt/k/lib/systemd/system/kuasar-quark.service", 0o644),
    ("opt/k/lib/systemd/system/kuasar-vmm.service", 0o644),
    ("opt/k/lib/systemd/system/kuasar-wasm.service", 0o644),
    ("opt/k/share/bash-completion/completions/kuasar-ctl", 0o644),
    (
        "opt/k/share/doc/kuasar-embed/containerd/1.7-shim.toml",
        0o644,
    ),
    (
        "opt/k/share/doc/kuasar-embed/containerd/2-proxy.toml",
        0o644,
    ),
    ("opt/k/share/doc/kuasar-embed/containerd/2-shim.toml", 0o644),
    (
        "opt/k/share/doc/kuasar-embed/kubernetes/daemonset.yaml",
        0o644,
    ),
    (
        "opt/k/share/doc/kuasar-embed/kubernetes/runtimeclass.yaml",
        0o644,
    ),
    (
        "opt/k/share/fish/vendor_completions.d/kuasar-ctl.fish",
        0o644,
    ),
    ("opt/k/share/man/man1/kuasar-ctl.1", 0o644),
    ("opt/k/share/zsh/site-functions/_kuasar-ctl", 0o644),
    ("var/lib/kuasar/initramfs.cpio", 0o644),
    ("var/lib/kuasar/vmlinux", 0o644),
];

fn no_guest() -> Option<String> {
    let info = Command::new(bin_dir().join("kuasar-ctl"))
        .args(["guest", "info"])
        .output()
        .unwrap();
    let why = String::from_utf8_lossy(&info.stderr).into_owned();
    (!info.status.success()).then_some(why)
}

fn files(below: &Path, into: &mut Vec<(String, u32)>, top: &Path) {
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            files(&path, into, top);
        } else {
            let name = path.strip_prefix(top).unwrap().to_str().unwrap();
            into.push((name.to_owned(), meta.permissions().mode() & 0o777));
        }
    }
    into.sort();
}

#[test]
fn everything_is_where_the_documents_say() {
    skip_if!(no_guest());
    let dest = tempfile::tempdir().unwrap();
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let script = |name: &str| {
        let output = Command::new(name)
            .args([bin_dir(), bin_dir()])
            .env("DESTDIR", dest.path())
            .env("PREFIX", "/opt/k")
            .current_dir(&top)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    script("scripts/install");
    let mut found = Vec::new();
    files(dest.path(), &mut found, dest.path());
    found.retain(|(name, _)| !name.contains("man1/kuasar-ctl-"));
    let mut expected = INSTALLED.map(|(n, mode)| (n.to_owned(), mode));
    expected.sort();
    assert_eq!(found, expected);
    for command in ["run", "check", "guest-build"] {
        let page = format!("opt/k/share/man/man1/kuasar-ctl-{command}.1");
        assert!(dest.path().join(&page).is_file(), "{page}");
    }

    for (name, program) in [
        ("kuasar-vmm", "vmm-sandboxer"),
        ("kuasar-wasm", "wasm-sandboxer"),
        ("kuasar-quark", "quark-sandboxer"),
    ] {
        let units = dest.path().join("opt/k/lib/systemd/system");
        let text = fs::read_to_string(units.join(format!("{name}.service"))).unwrap();
        let start = format!("\nExecStart=/opt/k/bin/{program}\n");
        assert!(text.contains(&start), "{text}");
        assert!(!text.contains("@BINDIR@"), "{text}");
        systemd_takes(dest.path(), &format!("{name}.service"), &text);
    }

    script("scripts/uninstall");
    let mut left = Vec::new();
    files(dest.path(), &mut left, dest.path());
    assert_eq!(left, []);
}

/// The programs are not at their place on this machine, so the check is told where they are.
fn systemd_takes(dest: &Path, name: &str, text: &str) {
    let unit = dest.join(name);
    let moved = dest.join("opt/k").display().to_string();
    fs::write(
        &unit,
        text.replace("ExecStart=/opt/k", &format!("ExecStart={moved}")),
    )
    .unwrap();
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&unit)
        .output();
    fs::remove_file(&unit).unwrap();
    match verify {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            // An unknown key is only said, not failed on.
            assert!(!said.contains(name), "{said}");
        }
        Err(error) => eprintln!("skipped: systemd-analyze: {error}"),
    }
}
