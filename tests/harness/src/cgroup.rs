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
        Self::make(&format!("{name}-{}", std::process::id()))
    }

    /// Makes the slice `name` where systemd would, with those that it is in.
    ///
    /// # Errors
    /// Why the host does not let us, for `skipped:`.
    pub fn slice(name: &str) -> Result<Self, String> {
        let stem = name.trim_end_matches(".slice");
        let ends = stem.match_indices('-').map(|(at, _)| at);
        let slices = ends.chain([stem.len()]);
        let slices: Vec<_> = slices
            .map(|end| format!("{}.slice", &stem[..end]))
            .collect();
        Self::make(&slices.join("/"))
    }

    fn make(name: &str) -> Result<Self, String> {
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
        let mut made = Self {
            dirs: Vec::new(),
            name: name.to_owned(),
        };
        for root in roots {
            let mut dir = root;
            for part in name.split('/') {
                dir.push(part);
                match fs::create_dir(&dir) {
                    Ok(()) => made.dirs.push(dir.clone()),
                    // One hierarchy under two names, or a slice that others are in.
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(format!("{} cannot be made: {e}", dir.display())),
                }
            }
        }
        if made.dirs.is_empty() {
            return Err("no cgroup hierarchy is mounted".to_owned());
        }
        Ok(made)
    }

    /// Processes and threads in the cgroups of pods below it.
    #[must_use]
    pub fn members(&self) -> Vec<String> {
        let last = self.name.rsplit('/').next().unwrap_or_default();
        let leaves = self.dirs.iter().filter(|dir| dir.ends_with(last));
        let below = leaves.flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
        let files = below.flat_map(|entry| ["tasks", "cgroup.procs"].map(|f| entry.path().join(f)));
        let texts = files.filter_map(|file| fs::read_to_string(file).ok());
        texts
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    }

    /// As CRI names it, in `cgroup_parent`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for dir in self.dirs.iter().rev() {
            if let Err(e) = fs::remove_dir(dir) {
                eprintln!("{} remains: {e}", dir.display());
            }
        }
    }
}
