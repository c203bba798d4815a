//! Counts what a daemon holds, so that a test can show that a pod left nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::eventually;

/// Everything that a pod can leave behind, as the host shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Threads of the daemon that belong to a VM, by name.
    pub vm_threads: Vec<String>,
    /// Open fds of the daemon.
    pub fds: usize,
    /// KVM VMs and vCPUs, memfds: fds whose target says so.
    pub vm_fds: Vec<String>,
    /// Mount points inside the daemon's folder.
    pub mounts: Vec<String>,
    /// Child processes of the daemon.
    pub children: Vec<String>,
    /// Every cgroup of the host without a process: those of others come and go.
    pub cgroups: BTreeSet<String>,
    /// Files and folders in the daemon's state folder.
    pub files: BTreeSet<String>,
}

impl Held {
    /// What `daemon` holds now.
    #[must_use]
    pub fn by(daemon: &Daemon) -> Self {
        let proc_dir = format!("/proc/{}", daemon.pid());
        let mut held = Self {
            vm_threads: vm_threads(&proc_dir),
            mounts: mounts(&proc_dir, daemon.dir()),
            children: children(daemon.pid()),
            ..Self::default()
        };
        for fd in list(&format!("{proc_dir}/fd")) {
            let target = fs::read_link(format!("{proc_dir}/fd/{fd}")).unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            // The daemon's own, kept for the pods to come.
            if ["memfd:template", "memfd:wasm-memory-image"]
                .iter()
                .any(|own| target.contains(own))
            {
                continue;
            }
            held.fds += 1;
            if target.contains("kvm-v") || target.contains("memfd:") {
                held.vm_fds.push(target);
            }
        }
        held.vm_fds.sort();
        walk(&daemon.state_dir(), &mut |path| {
            held.files.insert(path.to_string_lossy().into_owned());
        });
        walk(Path::new("/sys/fs/cgroup"), &mut |path| {
            if path.is_dir() && is_empty_cgroup(path) {
                held.cgroups.insert(path.to_string_lossy().into_owned());
            }
        });
        held
    }

    /// Fails the test unless the daemon comes back to what it held before.
    ///
    /// Connections and idle workers of the async runtime close on their own time, hence the
    /// short wait.
    ///
    /// # Panics
    /// When something remains; the message names it.
    #[track_caller]
    pub fn assert_back(&self, daemon: &Daemon) {
        let mut last = Self::default();
        let limit = Duration::from_secs(10);
        let start = std::time::Instant::now();
        let back = eventually("reading the daemon's tables", limit * 2, || {
            last = Self::by(daemon);
            let same = last.fds <= self.fds
                && last.vm_threads == self.vm_threads
                && last.vm_fds == self.vm_fds
                && last.mounts == self.mounts
                && last.children == self.children
                && last.cgroups.is_subset(&self.cgroups)
                && last.files == self.files;
            if same {
                Some(true)
            } else {
                (start.elapsed() > limit).then_some(false)
            }
        });
        assert!(
            back,
            "the pod left something behind\nbefore: {self:#?}\nafter: {last:#?}"
        );
    }
}

/// Whether nothing runs in a cgroup: what is left of a pod is empty.
fn is_empty_cgroup(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|pids| pids.trim().is_empty())
}

/// Names of entries in a folder; empty when it cannot be read.
fn list(dir: &str) -> Vec<String> {
    fs::read_dir(dir)
        .map(|entries| {
            entries
                .flatten()
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default()
}

/// Threads of the daemon other than the async runtime's own.
fn vm_threads(proc_dir: &str) -> Vec<String> {
    let mut names: Vec<String> = list(&format!("{proc_dir}/task"))
        .iter()
        .filter_map(|tid| fs::read_to_string(format!("{proc_dir}/task/{tid}/comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| {
            !["sandboxer", "tokio", "vmm-sandboxer"]
                .iter()
                .any(|own| name.starts_with(own))
        })
        .collect();
    names.sort();
    names
}

fn mounts(proc_dir: &str, below: &Path) -> Vec<String> {
    let below = below.to_string_lossy().into_owned();
    fs::read_to_string(format!("{proc_dir}/mountinfo"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| point.starts_with(&below))
        .map(str::to_owned)
        .collect()
}

fn children(of: u32) -> Vec<String> {
    list("/proc")
        .iter()
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .filter_map(|stat| {
            // pid (comm) state ppid ...; comm may hold spaces and parentheses.
            let (head, tail) = stat.rsplit_once(") ")?;
            let parent = tail.split(' ').nth(1)?.parse::<u32>().ok()?;
            (parent == of).then(|| head.to_owned())
        })
        .collect()
}

fn walk(dir: &Path, visit: &mut impl FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        visit(&path);
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&path, visit);
        }
    }
}
