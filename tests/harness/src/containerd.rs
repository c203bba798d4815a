//! A containerd of the test's own, with our daemon as its sandboxer: as a proxy plugin, or
//! through the shims.
//!
//! Its files, sockets and state lie in a temporary folder, and it runs in a network namespace
//! of its own, so that the bridge of its pods and everything else CNI makes ends with it.

mod config;

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::cri::{Cri, v1};
use crate::daemon::Daemon;
use crate::netns::NetNs;
use crate::{bin_dir, eventually};

/// Name of the runtime handler and of the sandboxer behind it.
pub const HANDLER: &str = "kuasar-vmm";

/// Runtime handler of pods that `wasm-sandboxer` runs.
pub const WASM_HANDLER: &str = "kuasar-wasm";

/// Runtime handler of pods that `quark-sandboxer` runs.
pub const QUARK_HANDLER: &str = "kuasar-quark";

/// The image of the process that holds a pod's namespaces, for pods without a VM.
pub const PAUSE: &str = "docker.io/library/pause:1";

/// Why there is no runc to compare with, or `None` when there is.
#[must_use]
pub fn runc_missing() -> Option<String> {
    let runc = Line::V2.installed().join("bin/runc");
    match Command::new(&runc).arg("--version").output() {
        Ok(out) if out.status.success() => None,
        Ok(out) => Some(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(e) => Some(format!("{}: {e}; run scripts/containerd", runc.display())),
    }
}

/// The shims that containerd looks for on its PATH: for pods of a proxy plugin, when it loads
/// what it left; and for every pod in [`Mode::Shim`].
pub const SHIMS: [&str; 6] = [
    "containerd-shim-kuasar-quark-v1",
    "containerd-shim-kuasar-quark-v2",
    "containerd-shim-kuasar-vmm-v1",
    "containerd-shim-kuasar-vmm-v2",
    "containerd-shim-kuasar-wasm-v1",
    "containerd-shim-kuasar-wasm-v2",
];

/// How long containerd may take to start or to end, and `ctr` to import an image.
const LIMIT: Duration = Duration::from_secs(60);

/// Which containerd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Line {
    /// 2.1 or later.
    #[default]
    V2,
    /// 1.7, which knows no proxy plugins of type "sandbox".
    V1_7,
}

impl Line {
    /// Where `scripts/containerd` puts what it gets.
    fn installed(self) -> PathBuf {
        let cache = std::env::var_os("KUASAR_CACHE_DIR")
            .map(PathBuf::from)
            .or_else(|| {
                let base = std::env::var_os("XDG_CACHE_HOME")?;
                Some(Path::new(&base).join("kuasar-embed"))
            })
            .unwrap_or_else(|| PathBuf::from("/var/cache/kuasar-embed"));
        cache.join(match self {
            Self::V2 => "peers/containerd",
            Self::V1_7 => "peers/containerd-1.7",
        })
    }

    /// Why it cannot be started here, or `None` when it can.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("containerd needs root".to_owned());
        }
        let bin = self.installed().join("bin/containerd");
        if !bin.exists() {
            return Some(format!(
                "there is no {}: run scripts/containerd",
                bin.display()
            ));
        }
        NetNs::missing()
    }
}

/// How containerd reaches the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As a proxy plugin.
    #[default]
    Proxy,
    /// Through a shim per pod.
    Shim,
}

/// What differs between containerds.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime handler, which also names the shim.
    pub handler: &'static str,
    /// Which containerd.
    pub line: Line,
    /// How it reaches the daemon.
    pub mode: Mode,
    /// `fifo` or `streaming`.
    pub io_type: &'static str,
    /// `overlayfs`, `native`, `erofs` or `blockfile`.
    pub snapshotter: &'static str,
    /// Network of the pods' bridge, its first three bytes.
    pub subnet: &'static str,
    /// Whether pods have an interface of a second network, 10.214.7.0/24.
    pub second_network: bool,
    /// Whether there is a runtime handler `runc`, too. Its pods want a lower OOM score than this
    /// process may be allowed to give.
    pub runc: bool,
    /// Where containerd takes events; unset: in its own folder.
    pub ttrpc: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            handler: HANDLER,
            line: Line::default(),
            mode: Mode::default(),
            io_type: "fifo",
            snapshotter: "overlayfs",
            subnet: "10.213.7",
            second_network: false,
            runc: false,
            ttrpc: None,
        }
    }
}

/// A running containerd; ended and removed on drop.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    netns: NetNs,
    /// A client of its CRI.
    pub cri: Cri,
    line: Line,
    environment: Vec<(&'static str, PathBuf)>,
    dir: TempDir,
}

/// Why no containerd 2 can be started here, or `None` when one can.
#[must_use]
pub fn containerd_missing() -> Option<String> {
    Line::V2.missing()
}

/// A shim that serves a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shim {
    /// Its process id.
    pub pid: u32,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Containerd {
    /// Starts a containerd whose runtime `options.handler` is `daemon`.
    ///
    /// # Panics
    /// When it does not become ready; the message holds its log.
    #[must_use]
    pub fn start(daemon: &Daemon, options: &Options) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kuasar-ctrd-")
            .tempdir()
            .expect("temporary dir");
        let shims = dir.path().join("bin");
        fs::create_dir_all(&shims).expect("create a folder");
        for shim in SHIMS {
            std::os::unix::fs::symlink(bin_dir().join(shim), shims.join(shim)).expect("link");
        }
        if options.snapshotter == "blockfile" {
            // Grows as layers fill it: 64 MiB hold those of the tests' images.
            let _ = crate::disk::ext4(&dir.path().join(config::SCRATCH), 64, None);
        }
        config::write_cni(dir.path(), options.subnet);
        let config = config::config(dir.path(), &daemon.address(), options);
        fs::write(dir.path().join("config.toml"), config).expect("write containerd's config");
        let netns = NetNs::new();
        let cri = Cri::new(&dir.path().join("containerd.sock"));
        let environment = vec![
            ("KUASAR_VMM_SANDBOXER", daemon.address()),
            ("KUASAR_WASM_SANDBOXER", daemon.address()),
            ("KUASAR_QUARK_SANDBOXER", daemon.address()),
            ("ENABLE_CRI_SANDBOXES", "yes".into()),
        ];
        let child = launch(options.line, dir.path(), &netns, &environment);
        let mut containerd = Self {
            child,
            netns,
            cri,
            line: options.line,
            environment,
            dir,
        };
        containerd.await_ready();
        containerd
    }

    /// Ends it with SIGKILL or SIGTERM and starts it anew on the same files.
    ///
    /// # Panics
    /// When it does not end or become ready again.
    pub fn restart(&mut self, signal: Signal) {
        self.end(signal);
        self.child = launch(self.line, self.dir.path(), &self.netns, &self.environment);
        self.await_ready();
    }

    /// Another client of its CRI.
    #[must_use]
    pub fn cri(&self) -> Cri {
        Cri::new(&self.dir.path().join("containerd.sock"))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The network namespace it runs in, with the bridge of its pods.
    #[must_use]
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The folder that holds everything of it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("containerd.log")).unwrap_or_default()
    }

    /// Runs `ctr` in the namespace of CRI.
    ///
    /// # Panics
    /// When it fails.
    pub fn ctr(&self, args: &[&str]) -> Output {
        let out = Command::new(self.line.installed().join("bin/ctr"))
            .arg("--address")
            .arg(self.dir.path().join("containerd.sock"))
            .args(["--namespace", "k8s.io", "--timeout"])
            .arg(format!("{}s", LIMIT.as_secs()))
            .args(args)
            .output()
            .expect("run ctr");
        assert!(out.status.success(), "ctr {args:?}: {out:?}");
        out
    }

    /// Imports an archive and waits until CRI knows `image`.
    ///
    /// # Panics
    /// When it does not get there.
    pub fn import(&self, archive: &Path, image: &str) {
        let archive = archive.to_str().expect("a path in UTF-8");
        self.ctr(&["images", "import", archive]);
        eventually("CRI's sight of the image", LIMIT, || {
            let images = self.cri.images().ok()?;
            images.iter().any(|name| name == image).then_some(())
        });
    }

    /// Describes a device by the Container Device Interface: `kind`=`name` is the host's node
    /// `device`, and sets `KUASAR_CDI` to the name.
    ///
    /// # Panics
    /// When the description cannot be written.
    pub fn describe_device(&self, kind: &str, name: &str, device: &str) {
        let spec = serde_json::json!({
            "cdiVersion": "0.6.0",
            "kind": kind,
            "devices": [{
                "name": name,
                "containerEdits": {
                    "deviceNodes": [{"path": device, "permissions": "rw"}],
                    "env": [format!("KUASAR_CDI={name}")],
                },
            }],
        });
        let dir = self.dir.path().join(config::CDI);
        fs::create_dir_all(&dir).expect("the folder of devices");
        fs::write(dir.join(format!("{name}.json")), spec.to_string()).expect("a description");
    }

    /// What pods may leave with it: mounts (network namespaces among them), bundles of tasks,
    /// addresses of their network.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = self.mounts();
        let state = self.dir.path().join("state");
        left.extend(entries(&state.join("io.containerd.runtime.v2.task/k8s.io")));
        left.extend(entries(&state.join("io.containerd.grpc.v1.cri/containers")));
        let sandboxes = "io.containerd.sandbox.controller.v1.shim/k8s.io";
        left.extend(entries(&state.join(sandboxes)));
        left.extend(self.shims().iter().map(|shim| format!("{shim:?}")));
        let ipam = self.dir.path().join("ipam");
        let mut addresses = entries(&ipam.join("test"));
        addresses.extend(entries(&ipam.join("second")));
        let taken = |path: &String| {
            let name = path.rsplit('/').next().unwrap_or_default();
            !name.starts_with("last_reserved_ip") && name != "lock"
        };
        left.extend(addresses.into_iter().filter(taken));
        left
    }

    /// The shims that serve its pods.
    #[must_use]
    pub fn shims(&self) -> Vec<Shim> {
        let address = self.dir.path().join("containerd.sock");
        entries(Path::new("/proc"))
            .into_iter()
            .filter_map(|proc| {
                let line = fs::read_to_string(Path::new(&proc).join("cmdline")).ok()?;
                let words: Vec<&str> = line.split('\0').collect();
                let after = |flag| {
                    let at = words.iter().position(|word| *word == flag)?;
                    words.get(at + 1).map(PathBuf::from)
                };
                let ours = words.contains(&"serve") && after("-address")? == address;
                ours.then_some(Shim {
                    pid: proc.rsplit('/').next()?.parse().ok()?,
                    socket: after("-socket")?,
                })
            })
            .collect()
    }

    fn mounts(&self) -> Vec<String> {
        let below = self.dir.path().to_string_lossy().into_owned();
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            // Layers that its snapshotter keeps mounted.
            .filter(|point| point.starts_with(&below) && !point.contains(".v1.erofs/snapshots/"))
            .map(str::to_owned)
            .collect()
    }

    fn await_ready(&mut self) {
        let mut last = String::new();
        let ready = eventually("containerd's start", LIMIT * 2, || {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(Err(format!("it ended: {status}")));
            }
            match self.cri.status(v1::StatusRequest::default()) {
                Ok(answer) => {
                    let conditions = answer.status.unwrap_or_default().conditions;
                    last = format!("{conditions:?}");
                    conditions.iter().all(|c| c.status).then_some(Ok(()))
                }
                Err(status) => {
                    last = status.to_string();
                    None
                }
            }
        });
        ready.unwrap_or_else(|why| panic!("{why}; last answer: {last}\n{}", self.log()));
    }

    fn end(&mut self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
        eventually("containerd's end", LIMIT, || {
            self.child.try_wait().expect("wait for containerd")
        });
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && !std::thread::panicking() {
            self.end(Signal::SIGTERM);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What a failed test left mounted would keep the folder.
        let mut mounts = self.mounts();
        mounts.sort();
        for point in mounts.iter().rev() {
            let _ = nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
        if std::thread::panicking() {
            eprintln!("--- log of containerd ---\n{}", self.log());
        }
    }
}

fn entries(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.path().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default()
}

fn launch(line: Line, dir: &Path, netns: &NetNs, environment: &[(&str, PathBuf)]) -> Child {
    let notify_path = dir.join("notify");
    let _ = fs::remove_file(&notify_path);
    let notify = UnixDatagram::bind(&notify_path).expect("bind the notify socket");
    notify
        .set_read_timeout(Some(LIMIT))
        .expect("set a deadline");
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("containerd.log"))
        .expect("create containerd's log");
    let path = format!(
        "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
        dir.join("bin").display(),
        line.installed().join("bin").display(),
    );
    let namespace = netns.open();
    let mut command = Command::new(line.installed().join("bin/containerd"));
    command
        .arg("--config")
        .arg(dir.join("config.toml"))
        .env("PATH", path)
        .env("NOTIFY_SOCKET", &notify_path)
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: between fork and exec only setns is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?));
    }
    let child = command.spawn().expect("start containerd");
    let mut message = [0; 4096];
    match notify.recv(&mut message) {
        Ok(n) if String::from_utf8_lossy(&message[..n]).contains("READY=1") => {}
        other => {
            let log = fs::read_to_string(dir.join("containerd.log")).unwrap_or_default();
            panic!("containerd did not say READY: {other:?}\n{log}");
        }
    }
    child
}
