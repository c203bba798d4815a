//! A cgroup on the host, such as the kubelet makes for each pod.

use std::fs;
use std::path::{Path, PathBuf};

/// A cgroup below the root of each hierarchy that accounts for pods; removed on drop.
#[derive(Debug)]
pub struct PodCgroup {
    name: String,
    dirs: Vec<PathBuf>,
}

impl PodCgroup {
    /// Makes it.
    ///
    /// # Errors
    /// Why the host does not let us, for `skipped:`.
    pub fn new(name: &str) -> Result<Self, String> {
        let top = Path::new("/sys/fs/cgroup");
        let roots = if top.join("cgroup.controllers").exists() {
            vec![top.to_owned()]
        } else {
            ["cpu", "cpuacct", "memory", "pids"]
                .map(|controller| top.join(controller))
                .into_iter()
                .filter(|root| root.is_dir())
                .collect()
        };
        let name = format!("{name}-{}", std::process::id());
        let mut made = Self {
            dirs: Vec::new(),
            name,
        };
        for root in roots {
            let dir = root.join(&made.name);
            match fs::create_dir(&dir) {
                Ok(()) => made.dirs.push(dir),
                // One hierarchy under two names.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(format!("{} cannot be made: {e}", dir.display())),
            }
        }
        if made.dirs.is_empty() {
            return Err("no cgroup hierarchy is mounted".to_owned());
        }
        Ok(made)
    }

    /// As CRI names it, in `cgroup_parent`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for dir in &self.dirs {
            if let Err(e) = fs::remove_dir(dir) {
                eprintln!("{} remains: {e}", dir.display());
            }
        }
    }
}
