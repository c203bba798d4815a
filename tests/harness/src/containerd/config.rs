//! What a containerd of the tests is configured with.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::{Line, Mode, Options, PAUSE};

/// What the blockfile snapshotter copies for each layer, in containerd's folder.
pub(super) const SCRATCH: &str = "scratch.ext4";

/// Descriptions of devices, in containerd's folder.
pub(super) const CDI: &str = "cdi";

/// The configuration of a containerd in `dir` for the daemon on `sandboxer`.
pub(super) fn config(dir: &Path, sandboxer: &Path, options: &Options) -> String {
    match options.line {
        Line::V2 => v2(dir, sandboxer, options),
        Line::V1_7 => v1_7(dir, options),
    }
}

/// Folders and sockets, the same for both.
fn common(dir: &Path, options: &Options) -> String {
    let own = dir.join("containerd.sock.ttrpc");
    let ttrpc = options.ttrpc.as_ref().unwrap_or(&own).display();
    let wanted = options.snapshotter;
    // What needs kernel modules or daemons that these tests do not use.
    let disabled: Vec<String> = ["blockfile", "btrfs", "devmapper", "erofs", "zfs"]
        .into_iter()
        .filter(|name| *name != wanted)
        .map(|name| format!("io.containerd.snapshotter.v1.{name}"))
        .chain((wanted != "erofs").then(|| "io.containerd.differ.v1.erofs".to_owned()))
        .chain(["nri.v1.nri", "internal.v1.opt"].map(|name| format!("io.containerd.{name}")))
        .collect();
    let dir = dir.display();
    format!(
        r#"root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = {disabled:?}

[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{ttrpc}"
[debug]
  level = "debug"
"#
    )
}

fn v2(dir: &Path, sandboxer: &Path, options: &Options) -> String {
    let Options {
        handler,
        io_type,
        snapshotter,
        ..
    } = options;
    let (version, name) = match options.mode {
        Mode::Proxy => ("v1", "vmm"),
        Mode::Shim => ("v2", "shim"),
    };
    format!(
        r#"version = 3
{common}
[proxy_plugins.vmm]
  type = "sandbox"
  address = "{sandboxer}"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{snapshotter}"
[plugins.'io.containerd.snapshotter.v1.blockfile']
  root_path = "{dir}/blockfile"
  scratch_file = "{dir}/{SCRATCH}"
  fs_type = "ext4"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
[plugins.'io.containerd.cri.v1.runtime']
  cdi_spec_dirs = ["{dir}/{CDI}"]
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = {restrict}
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{cni}"]
  conf_dir = "{dir}/cni"
  max_conf_num = {networks}
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "{handler}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]
  runtime_type = "io.containerd.{handler}.{version}"
  sandboxer = "{name}"
  io_type = "{io_type}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}-streaming]
  runtime_type = "io.containerd.{handler}.{version}"
  sandboxer = "{name}"
  io_type = "streaming"
{runc}"#,
        runc = if options.runc { RUNC } else { "" },
        restrict = options.runc,
        common = common(dir, options),
        networks = networks(options),
        sandboxer = sandboxer.display(),
        cni = options.line.installed().join("cni").display(),
        dir = dir.display(),
    )
}

fn v1_7(dir: &Path, options: &Options) -> String {
    format!(
        r#"version = 2
{common}
[plugins."io.containerd.grpc.v1.cri"]
  enable_cdi = true
  cdi_spec_dirs = ["{dir}/{CDI}"]
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni}"
  conf_dir = "{dir}/cni"
  max_conf_num = {networks}
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{snapshotter}"
  default_runtime_name = "{handler}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
  runtime_type = "io.containerd.{handler}.v2"
  sandbox_mode = "shim"
"#,
        common = common(dir, options),
        cni = options.line.installed().join("cni").display(),
        networks = networks(options),
        snapshotter = options.snapshotter,
        handler = options.handler,
        dir = dir.display(),
    )
}

/// The peer of benchmarks.
const RUNC: &str = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = \"io.containerd.runc.v2\"
";

/// How many networks a pod is in.
fn networks(options: &Options) -> u8 {
    1 + u8::from(options.second_network)
}

/// Pods on a bridge, with addresses that are noted in the test's folder.
pub(super) fn write_cni(dir: &Path, subnet: &str) {
    let conf = json!({
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "mtu": 1400,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [
                    [{"subnet": format!("{subnet}.0/24")}],
                    [{"subnet": "fd00:213:7::/64"}],
                ],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    });
    let second = json!({
        "cniVersion": "1.0.0",
        "name": "second",
        "plugins": [{
            "type": "ptp",
            "mtu": 1300,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [[{"subnet": "10.214.7.0/24"}]],
            },
        }],
    });
    fs::create_dir_all(dir.join("cni")).expect("create a folder");
    fs::write(dir.join("cni/20-second.conflist"), second.to_string()).expect("write CNI's config");
    fs::write(dir.join("cni/10-test.conflist"), conf.to_string()).expect("write CNI's config");
}
