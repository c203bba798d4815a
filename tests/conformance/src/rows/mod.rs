//! The rows, by number.

mod containers;
mod disks;
mod files;
mod network;
mod node;
mod pods;
mod resources;
mod security;
mod streams;

use crate::{Outcome, Row, Suite, skip};

/// A row; `core` ones are checked with each change.
const fn row(number: u32, name: &'static str, run: fn(&Suite) -> Outcome) -> Row {
    Row {
        number,
        name,
        core: false,
        run,
    }
}

const fn core(number: u32, name: &'static str, run: fn(&Suite) -> Outcome) -> Row {
    Row {
        core: true,
        ..row(number, name, run)
    }
}

/// All rows. Those that restart things come last, whatever their number.
pub const ROWS: &[Row] = &[
    core(1, "a pod is ready, with attributes and labels", pods::ready),
    core(
        2,
        "stopping and removing pods is idempotent",
        pods::idempotent,
    ),
    core(3, "a container in each of its states", containers::states),
    core(
        4,
        "containers share network, IPC and UTS",
        pods::shared_namespaces,
    ),
    core(
        5,
        "PID namespace: shared, private, of a target",
        pods::pid_namespaces,
    ),
    core(
        6,
        "hostNetwork, hostPID, hostIPC are refused clearly",
        pods::host_namespaces,
    ),
    core(
        7,
        "ExecSync: output, exit code, timeout",
        containers::exec_sync,
    ),
    core(
        8,
        "exec: terminal, stdin, resize, ctrl-C, much input",
        streams::exec,
    ),
    core(9, "attach, attach again, end of stdin", streams::attach),
    core(
        10,
        "logs: both streams, reopen, partial lines",
        streams::logs,
    ),
    row(11, "IO over fifos and over streaming", streams::io_types),
    core(
        12,
        "stop: TERM, grace, KILL; real-time signals",
        containers::stop,
    ),
    core(13, "exit code, 128 + signal, times", containers::exit_codes),
    row(14, "OOMKilled, 137", resources::out_of_memory),
    core(15, "stats of containers", resources::container_stats),
    row(16, "stats of pods", resources::pod_stats),
    core(
        17,
        "environment, arguments, folder, defaults of the image",
        containers::process,
    ),
    core(
        18,
        "user, group, supplemental groups, user name",
        security::users,
    ),
    core(
        19,
        "capabilities: add, drop, all, ambient",
        security::capabilities,
    ),
    core(20, "no_new_privs", security::no_new_privs),
    row(
        21,
        "privileged, in the guest, without devices of the host",
        security::privileged,
    ),
    core(
        22,
        "read-only root; masked and read-only paths",
        security::read_only,
    ),
    core(
        23,
        "seccomp: default, localhost, unconfined",
        security::seccomp,
    ),
    row(
        24,
        "AppArmor and SELinux: ignored where default, else refused",
        security::lsm,
    ),
    row(
        25,
        "sysctls of network and IPC; unknown ones refused",
        pods::sysctls,
    ),
    core(26, "hostPath: ro, rw, file, link", files::host_path),
    core(
        27,
        "one source read-only here and writable there",
        files::two_views,
    ),
    row(
        28,
        "propagation from the host; recursive read-only",
        files::propagation,
    ),
    core(
        29,
        "hostPath of a fifo; of a socket: refused clearly",
        files::special_files,
    ),
    row(
        30,
        "emptyDir on disk, in memory, with a limit",
        files::empty_dir,
    ),
    core(31, "/dev/shm: size, shared in the pod", pods::shared_memory),
    row(32, "updates of configMaps are seen", files::config_map),
    row(33, "subPath", files::sub_path),
    row(34, "PVC on a block device", disks::volume),
    row(35, "raw block volumes", disks::raw),
    row(36, "devices, CDI, VFIO", disks::devices),
    row(37, "image volumes", files::image_volume),
    core(38, "host name", pods::host_name),
    core(39, "DNS, hosts", pods::dns),
    row(40, "dual stack, MTU, host ports", network::addresses),
    row(41, "two or more interfaces", network::two_interfaces),
    core(42, "port forwarding", network::port_forward),
    row(43, "UpdateContainerResources", resources::update),
    row(
        44,
        "limits decide the VM's size, at its start and later",
        resources::pod_size,
    ),
    row(45, "huge pages, CPU sets", resources::cpu_sets),
    row(
        46,
        "ulimits, OOM score, termination message",
        containers::odds_and_ends,
    ),
    row(
        47,
        "probes and hooks, as the kubelet makes them",
        containers::probes,
    ),
    row(
        48,
        "init containers; restart in the same pod",
        containers::restart,
    ),
    row(
        49,
        "a pod below a cgroup of systemd's",
        resources::systemd_cgroup,
    ),
    row(
        54,
        "user namespaces are refused clearly",
        pods::user_namespaces,
    ),
    row(55, "pause and resume", node::pause),
    core(
        51,
        "containerd restarts: IO and exit status survive",
        node::containerd_restart,
    ),
    row(
        52,
        "the guest panics: NotReady, nothing left",
        node::guest_panic,
    ),
    row(
        50,
        "the daemon restarts: pods are kept",
        node::daemon_restart,
    ),
    row(53, "stale state is cleaned up", node::stale_state),
    row(56, "many pods leave nothing", |_| {
        skip("`make soak` does that")
    }),
];
