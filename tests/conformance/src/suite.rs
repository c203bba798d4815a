//! What rows run on: a node, and a pod that many of them share.

use std::cell::{Cell, RefCell};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use e2e::node::Node;
use harness::containerd::{Line, Mode as Reach, Options};
use harness::cri::{Cri, v1};
use harness::kubelet::{Kubelet, Pod};
use harness::streaming::{Session, authority};

use crate::{Outcome, Row, Skipped, Verdict};

/// How containerd reaches the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// As a proxy plugin.
    Proxy,
    /// Through a shim per pod.
    Shim,
    /// containerd 1.7, through a shim per pod.
    #[value(name = "shim-1.7")]
    Shim17,
}

/// What runs the pods' VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// Threads of the daemon.
    InProcess,
    /// QEMU.
    Qemu,
}

/// What containerd keeps layers of images as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Snapshotter {
    /// Folders that it overlays.
    Overlayfs,
    /// A folder with a copy for each container.
    Native,
    /// Read-only images that it mounts and overlays.
    Erofs,
    /// A disk image for each container, of ext4, which the guest mounts.
    Blockfile,
}

impl Snapshotter {
    fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Native => "native",
            Self::Erofs => "erofs",
            Self::Blockfile => "blockfile",
        }
    }

    fn missing(self) -> Option<String> {
        match self {
            Self::Overlayfs | Self::Native => None,
            Self::Blockfile => harness::disk::tools_missing(),
            Self::Erofs => {
                let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
                let here = known.lines().any(|line| line.ends_with("\terofs"));
                (!here)
                    .then(|| "the host's kernel has no erofs".to_owned())
                    .or_else(harness::disk::tools_missing)
            }
        }
    }
}

/// Where the rows run.
#[derive(Clone, Debug)]
pub enum Setup {
    /// On a containerd and a daemon of their own.
    Own {
        /// How the one reaches the other.
        mode: Mode,
        /// What runs the VMs.
        backend: Backend,
        /// What containerd keeps layers of images as.
        snapshotter: Snapshotter,
    },
    /// On an installed node's.
    Installed {
        /// CRI's socket.
        endpoint: PathBuf,
        /// The runtime handler.
        handler: String,
        /// An image with a shell and the tools of busybox, which the node has.
        image: String,
    },
}

/// The node.
#[derive(Debug)]
enum Site {
    Own(Box<RefCell<Option<Node>>>),
    Installed,
}

/// Rows share it.
#[derive(Debug)]
pub struct Suite {
    /// Who uses the node.
    pub kubelet: Kubelet,
    /// How containerd reaches the daemon, where that is known.
    pub mode: Option<Mode>,
    /// What runs the VMs, where that is known.
    pub backend: Option<Backend>,
    site: Site,
    scratch: tempfile::TempDir,
    shared: RefCell<Option<String>>,
    shell: RefCell<Option<String>>,
    names: Cell<u32>,
}

/// What a QEMU guest is asked for, in the daemon's configuration.
const QEMU: &str = "[sandbox]\nmode = \"external\"\n[hypervisor]\nkind = \"qemu\"\n";

/// For rows of two networks, and of pods that grow.
const MACHINE: &str = "[vm]\nnet_slots = 2\nmax_memory = \"512MiB\"\nmax_vcpus = 2\n";

impl Suite {
    /// Starts what is needed.
    ///
    /// # Errors
    /// Why it cannot be had on this machine.
    pub fn start(setup: &Setup) -> Result<Self, Skipped> {
        let scratch = tempfile::Builder::new().prefix("kuasar-rows-").tempdir();
        let scratch = scratch.map_err(|e| Skipped(e.to_string()))?;
        let (kubelet, mode, site) = match setup {
            Setup::Own {
                mode,
                backend,
                snapshotter,
            } => {
                let (line, reach) = match mode {
                    Mode::Proxy => (Line::V2, Reach::Proxy),
                    Mode::Shim => (Line::V2, Reach::Shim),
                    Mode::Shim17 => (Line::V1_7, Reach::Shim),
                };
                if let Some(why) = line.missing().or_else(|| snapshotter.missing()) {
                    return Err(Skipped(why));
                }
                let kvm = harness::kvm_missing();
                if let (Backend::InProcess, Some(why)) = (backend, kvm) {
                    return Err(Skipped(why));
                }
                let ttrpc = scratch.path().join("ttrpc");
                let mut config = format!("[events]\ncontainerd = {ttrpc:?}\n{MACHINE}");
                if *backend == Backend::Qemu {
                    config.push_str(QEMU);
                }
                let options = Options {
                    line,
                    mode: reach,
                    ttrpc: Some(ttrpc),
                    second_network: true,
                    snapshotter: snapshotter.name(),
                    ..Options::default()
                };
                let node = Node::with_config(&config, &options);
                let kubelet = Kubelet {
                    cri: node.containerd.cri(),
                    handler: node.handler.clone(),
                    image: node.image.clone(),
                    logs: scratch.path().join("logs"),
                };
                let site = Site::Own(Box::new(RefCell::new(Some(node))));
                (kubelet, Some(*mode), site)
            }
            Setup::Installed {
                endpoint,
                handler,
                image,
            } => {
                let kubelet = Kubelet {
                    cri: Cri::new(endpoint),
                    handler: handler.clone(),
                    image: image.clone(),
                    logs: scratch.path().join("logs"),
                };
                (kubelet, None, Site::Installed)
            }
        };
        Ok(Self {
            kubelet,
            mode,
            backend: match setup {
                Setup::Own { backend, .. } => Some(*backend),
                Setup::Installed { .. } => None,
            },
            site,
            scratch,
            shared: RefCell::default(),
            shell: RefCell::default(),
            names: Cell::new(0),
        })
    }

    /// Goes through a row.
    pub fn run(&self, row: &Row) -> Verdict {
        match catch_unwind(AssertUnwindSafe(|| (row.run)(self))) {
            Ok(Ok(())) => Verdict::Pass,
            Ok(Err(Skipped(why))) => Verdict::Skip(why),
            Err(panic) => {
                // Whatever it left in the shared pod, the next rows need not meet it.
                let _ = catch_unwind(AssertUnwindSafe(|| self.renew()));
                Verdict::Fail(message(&*panic))
            }
        }
    }

    /// Ends the shared pod and checks that nothing is left of any.
    pub fn finish(self) {
        self.renew();
        assert_eq!(self.own_pods(), [""; 0]);
        if let Site::Own(node) = &self.site
            && let Some(node) = node.take()
        {
            node.assert_nothing_left();
        }
    }

    /// Pods that these rows made.
    fn own_pods(&self) -> Vec<String> {
        let pods = self.kubelet.pods().into_iter();
        pods.filter(|pod| pod.labels.contains_key("app"))
            .filter(|pod| pod.runtime_handler == self.kubelet.handler)
            .map(|pod| pod.id)
            .collect()
    }

    /// The next row gets a new shared pod.
    pub fn renew(&self) {
        self.shell.take();
        if let Some(id) = self.shared.take() {
            self.kubelet.remove_pod(&id);
        }
    }

    /// The pod that rows share; nothing may be left in it.
    pub fn pod(&self) -> Pod<'_> {
        let config = self.kubelet.pod_config("shared");
        let mut shared = self.shared.borrow_mut();
        if let Some(id) = &*shared {
            return self.kubelet.pod(id.clone(), config);
        }
        let pod = self.kubelet.run_pod_of(config);
        *shared = Some(pod.id.clone());
        pod
    }

    /// A pod of its own whose containers may be privileged.
    pub fn privileged_pod(&self, name: &str) -> Pod<'_> {
        let mut config = self.kubelet.pod_config(name);
        config.linux = Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                privileged: true,
                ..Default::default()
            }),
            ..Default::default()
        });
        self.kubelet.run_pod_of(config)
    }

    /// A container in the shared pod, to execute things in.
    pub fn shell(&self) -> String {
        let mut shell = self.shell.borrow_mut();
        if let Some(id) = &*shell {
            return id.clone();
        }
        let script = "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done";
        let id = self.pod().run("shell", script);
        *shell = Some(id.clone());
        id
    }

    /// A name that no other row has.
    pub fn name(&self, of: &str) -> String {
        self.names.set(self.names.get() + 1);
        format!("{of}-{}", self.names.get())
    }

    /// A container of the shared pod that runs `script`, to be changed before it runs.
    pub fn container(&self, of: &str, script: &str) -> v1::ContainerConfig {
        self.kubelet.container_config(&self.name(of), script)
    }

    /// What a container of the shared pod prints to stdout before it ends well.
    #[track_caller]
    pub fn output_of(&self, config: v1::ContainerConfig) -> String {
        let (status, log) = self.pod().finish(config);
        assert_eq!(status.exit_code, 0, "{log}");
        lines_of(&log, "stdout")
    }

    /// A new folder of the host.
    pub fn folder(&self) -> PathBuf {
        let folder = self.scratch.path().join(self.name("folder"));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Where all files of the rows are.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Works with a node of one's own.
    ///
    /// # Errors
    /// The node is installed: it is not ours to restart.
    pub fn with_node<T>(&self, work: impl FnOnce(&mut Node) -> T) -> Result<T, Skipped> {
        match &self.site {
            Site::Own(node) => Ok(work(node.borrow_mut().as_mut().unwrap())),
            Site::Installed => Err(Skipped(
                "needs a containerd and a daemon of its own".to_owned(),
            )),
        }
    }

    /// Opens a session at an address that CRI answered.
    pub fn session(&self, url: &str) -> Session {
        let address = authority(url).to_owned();
        let connect = || TcpStream::connect(&address).expect("connect to the streaming server");
        // It listens on the loopback interface of containerd's network namespace.
        let stream = self
            .with_node(|node| node.containerd.netns().run(connect))
            .unwrap_or_else(|_| connect());
        Session::new(stream, url)
    }
}

/// What a log of CRI holds of one stream.
pub fn lines_of(log: &str, stream: &str) -> String {
    let mut text = String::new();
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ');
        let (_, found, tag, rest) = (fields.next(), fields.next(), fields.next(), fields.next());
        if found == Some(stream) {
            text.push_str(rest.unwrap_or_default());
            if tag == Some("F") {
                text.push('\n');
            }
        }
    }
    text
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without message").to_owned()
}

/// A row that needs something that holds here.
///
/// # Errors
/// It does not hold, for this reason.
pub fn needs(holds: bool, why: &str) -> Outcome {
    if holds {
        return Ok(());
    }
    crate::skip(why)
}
