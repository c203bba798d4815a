//! The pod's cgroup on the host, which the kubelet makes and containerd reads.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tracing::{debug, warn};
use vmm_core::vm::Vm;

use super::{Pod, lock};

/// Where cgroups are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Hierarchies of version 1 that account for processes.
const V1: [&str; 5] = ["blkio", "cpu", "cpuacct", "memory", "pids"];

/// Those that account for threads of a process by themselves.
const V1_THREADED: [&str; 2] = ["cpu", "cpuacct"];

/// Cgroups below the pod's for what runs its machine; removed on drop.
#[derive(Debug)]
pub(super) struct HostCgroup(Vec<PathBuf>);

impl Pod {
    /// Has the host account for what runs `vm` as the pod's, where the pod has a cgroup. What
    /// is returned is to be done where blocking is allowed; the kernel takes its time.
    pub(super) fn account_for(&self, vm: &dyn Vm) -> impl FnOnce() + Send + use<> {
        let linux = self.request.config.linux.as_ref();
        let parent = linux.map_or("", |linux| linux.cgroup_parent.as_str());
        let processes = vm.host_processes();
        let threads = processes.is_empty();
        let (file, members) = match threads {
            true => ("tasks", vm.vcpu_threads()),
            false => ("cgroup.procs", processes),
        };
        let cgroup = HostCgroup::make(parent, self.id(), threads);
        let files: Vec<_> = cgroup.0.iter().map(|dir| dir.join(file)).collect();
        *lock(&self.cgroup) = Some(cgroup);
        move || {
            for (file, member) in files
                .iter()
                .flat_map(|f| members.iter().map(move |m| (f, m)))
            {
                // It may have ended.
                if let Err(e) = fs::write(file, member.to_string()) {
                    warn!("cannot write {member} to {}: {e}", file.display());
                }
            }
        }
    }
}

impl HostCgroup {
    /// Makes one below `parent`, as CRI names it, in each hierarchy that has it.
    fn make(parent: &str, pod: &str, threads: bool) -> Self {
        let mut made = Vec::new();
        if parent.is_empty() {
            return Self(made);
        }
        for dir in hierarchies(Path::new(ROOT), threads) {
            let parent = dir.join(path_of(parent));
            if !parent.is_dir() {
                debug!(pod, "there is no cgroup {}", parent.display());
                continue;
            }
            let own = parent.join(format!("kuasar-{pod}"));
            match fs::create_dir(&own) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                    warn!(pod, "cannot make the cgroup {}: {e}", own.display());
                }
                _ => made.push(own),
            }
        }
        Self(made)
    }

    /// Removes it once nothing runs in it; what remains is tried again on drop.
    pub(super) fn remove(&mut self) {
        self.0.retain(|dir| match fs::remove_dir(dir) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                debug!("the cgroup {} remains: {e}", dir.display());
                true
            }
            _ => false,
        });
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        self.remove();
        for dir in &self.0 {
            warn!("cannot remove the cgroup {}", dir.display());
        }
    }
}

/// Roots of the hierarchies that can hold the members: processes, or threads of this process.
fn hierarchies(root: &Path, threads: bool) -> BTreeSet<PathBuf> {
    let v2 = root.join("cgroup.controllers").exists();
    if v2 {
        // Threads stay below their process's cgroup.
        return if threads {
            BTreeSet::new()
        } else {
            [root.to_owned()].into()
        };
    }
    let names: &[&str] = if threads { &V1_THREADED } else { &V1 };
    let found = |name: &&str| -> io::Result<PathBuf> { fs::canonicalize(root.join(name)) };
    // One hierarchy may have several names.
    names.iter().filter_map(|name| found(name).ok()).collect()
}

/// A cgroup's path below the root: as it is named, or where systemd has the slice of that name.
fn path_of(parent: &str) -> PathBuf {
    let relative = |path: &str| -> PathBuf {
        let parts = path.split('/');
        parts
            .filter(|part| !matches!(*part, "" | "." | ".."))
            .collect()
    };
    let Some(slice) = parent
        .strip_suffix(".slice")
        .filter(|name| !name.contains('/'))
    else {
        return relative(parent);
    };
    // "a-b.slice" is below "a.slice".
    let ends = slice
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([slice.len()]);
    let ancestors = ends.filter_map(|end| slice.get(..end));
    ancestors.map(|name| format!("{name}.slice")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_found_where_systemd_puts_them() {
        let path = |parent: &str| path_of(parent).to_string_lossy().into_owned();
        assert_eq!(path("/kubepods/pod1"), "kubepods/pod1");
        assert_eq!(path("/../up"), "up");
        assert_eq!(
            path("kubepods-burstable-podx.slice"),
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice"
        );
        assert_eq!(path("/system.slice/a-b.slice"), "system.slice/a-b.slice");
    }

    #[test]
    fn threads_can_be_elsewhere_than_their_process_under_version_1_only() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cpu,cpuacct", "memory"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        for name in ["cpu", "cpuacct"] {
            std::os::unix::fs::symlink("cpu,cpuacct", root.path().join(name)).unwrap();
        }
        assert_eq!(hierarchies(root.path(), true).len(), 1);
        assert_eq!(hierarchies(root.path(), false).len(), 2);
        fs::write(root.path().join("cgroup.controllers"), "cpu memory").unwrap();
        assert!(hierarchies(root.path(), true).is_empty());
        assert_eq!(hierarchies(root.path(), false), [root.path().into()].into());
    }
}
