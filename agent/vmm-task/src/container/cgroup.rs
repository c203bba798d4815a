//! A container's cgroup (v2).

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_api::rpc::StatsResponse;
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use libcontainer::oci_spec::runtime::LinuxResources;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use tracing::warn;

use crate::error::AgentError;
use crate::sys;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// How long the kernel may take to freeze or to empty a cgroup.
const SETTLE_DEADLINE: Duration = Duration::from_secs(10);

/// Path of a container's cgroup below [`ROOT`]. The prefix keeps a container called
/// `cgroup.procs` apart from the file of that name.
pub fn path_of(container: &str) -> PathBuf {
    PathBuf::from(format!("/container-{container}"))
}

/// A cgroup, removed when dropped.
#[derive(Debug)]
pub struct Cgroup {
    container: String,
    dir: PathBuf,
    oom: Option<Arc<OomCount>>,
    removed: bool,
}

impl Cgroup {
    /// Makes the cgroup of a new container.
    pub fn create(container: &str) -> Result<Self, AgentError> {
        let below = path_of(container);
        let dir = Path::new(ROOT).join(below.strip_prefix("/").unwrap_or(&below));
        fs::create_dir(&dir).map_err(AgentError::io(format!("cgroup {}", dir.display())))?;
        let oom = OomCount::open(&dir).map(Arc::new);
        Ok(Self {
            container: container.to_owned(),
            dir,
            oom,
            removed: false,
        })
    }

    /// Counts OOM kills, when the memory controller is there.
    pub fn oom(&self) -> Option<Arc<OomCount>> {
        self.oom.clone()
    }

    fn write(&self, file: &str, text: &str) -> Result<(), AgentError> {
        let path = self.dir.join(file);
        fs::write(&path, text).map_err(AgentError::io(format!("writing {}", path.display())))
    }

    /// Pids of everything inside.
    pub fn pids(&self) -> Result<Vec<u32>, AgentError> {
        let path = self.dir.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(AgentError::io(path.display().to_string()))?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
    }

    /// Kills everything inside.
    pub fn kill(&self) -> Result<(), AgentError> {
        self.write("cgroup.kill", "1")
    }

    /// Stops or continues everything inside.
    /// The future is ready when it is done.
    pub fn freeze(
        &self,
        frozen: bool,
    ) -> Result<impl Future<Output = Result<(), AgentError>> + Send + use<>, AgentError> {
        let events = Events::open(&self.dir)?;
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        Ok(events.wait("frozen", u64::from(frozen)))
    }

    /// Kills what is left inside, waits for it and removes the cgroup.
    pub async fn remove(&mut self) -> Result<(), AgentError> {
        match fs::remove_dir(&self.dir) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => return self.removed(other),
        }
        let events = Events::open(&self.dir)?;
        self.kill()?;
        events.wait("populated", 0).await?;
        let again = fs::remove_dir(&self.dir);
        self.removed(again)
    }

    fn removed(&mut self, result: io::Result<()>) -> Result<(), AgentError> {
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AgentError::io(format!(
                "removing cgroup {}",
                self.dir.display()
            ))(e)),
            _ => {
                self.removed = true;
                Ok(())
            }
        }
    }

    /// Sets new limits.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), AgentError> {
        let options = ControllerOpt {
            resources,
            freezer_state: None,
            oom_score_adj: None,
            disable_oom_killer: false,
        };
        let applied = self.manager()?.apply(&options);
        applied.map_err(|e| AgentError::Runtime(format!("limits of {}: {e}", self.container)))
    }

    fn manager(&self) -> Result<AnyCgroupManager, AgentError> {
        let config = CgroupConfig {
            cgroup_path: path_of(&self.container),
            systemd_cgroup: false,
            container_name: self.container.clone(),
        };
        create_cgroup_manager(config).map_err(|e| AgentError::Runtime(e.to_string()))
    }

    /// Usage and limits; figures of controllers that are not there stay 0.
    pub fn stats(&self) -> StatsResponse {
        let text = |file: &str| fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        let cpu = text("cpu.stat");
        let memory = text("memory.stat");
        StatsResponse {
            cpu_usage_us: keyed(&cpu, "usage_usec"),
            cpu_user_us: keyed(&cpu, "user_usec"),
            cpu_system_us: keyed(&cpu, "system_usec"),
            cpu_nr_periods: keyed(&cpu, "nr_periods"),
            cpu_nr_throttled: keyed(&cpu, "nr_throttled"),
            cpu_throttled_us: keyed(&cpu, "throttled_usec"),
            memory_usage_bytes: single(&text("memory.current")),
            memory_limit_bytes: single(&text("memory.max")),
            memory_anon_bytes: keyed(&memory, "anon"),
            memory_file_bytes: keyed(&memory, "file"),
            memory_inactive_file_bytes: keyed(&memory, "inactive_file"),
            memory_oom_kills: keyed(&text("memory.events"), "oom_kill"),
            pids_current: single(&text("pids.current")),
            pids_limit: single(&text("pids.max")),
            ..Default::default()
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        // Without a process inside this changes nothing.
        let _ = self.kill();
        if let Err(e) = fs::remove_dir(&self.dir)
            && e.kind() != io::ErrorKind::NotFound
        {
            warn!(
                container = self.container,
                "cgroup {} stays: {e}",
                self.dir.display()
            );
        }
    }
}

/// The value of `key` in a file of `key value` lines; 0 without it.
fn keyed(text: &str, key: &str) -> u64 {
    let value = |line: &str| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    };
    text.lines().find_map(value).unwrap_or(0)
}

/// A file with one number; `max` is `u64::MAX`.
fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// `cgroup.events`, whose changes the kernel announces.
struct Events {
    file: AsyncFd<fs::File>,
}

impl Events {
    fn open(dir: &Path) -> Result<Self, AgentError> {
        let path = dir.join("cgroup.events");
        let file = fs::File::open(&path)
            .and_then(|f| sys::polled(f, Interest::PRIORITY))
            .map_err(AgentError::io(path.display().to_string()))?;
        Ok(Self { file })
    }

    async fn wait(self, key: &str, value: u64) -> Result<(), AgentError> {
        let changed = async {
            loop {
                let text = read_at_start(self.file.get_ref())?;
                if keyed(&text, key) == value {
                    return Ok(());
                }
                self.file.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        match timeout(SETTLE_DEADLINE, changed).await {
            Ok(result) => result.map_err(AgentError::io("cgroup.events")),
            Err(_) => Err(AgentError::Deadline("the cgroup")),
        }
    }
}

fn read_at_start(file: &fs::File) -> io::Result<String> {
    let mut buf = [0; 512];
    let n = file.read_at(&mut buf, 0)?;
    Ok(String::from_utf8_lossy(buf.get(..n).unwrap_or_default()).into_owned())
}

/// Counts the OOM kills of one container and notices new ones.
#[derive(Debug)]
pub struct OomCount {
    file: AsyncFd<fs::File>,
    seen: AtomicU64,
}

impl OomCount {
    fn open(dir: &Path) -> Option<Self> {
        let file = fs::File::open(dir.join("memory.events")).ok()?;
        Some(Self {
            file: sys::polled(file, Interest::PRIORITY).ok()?,
            seen: AtomicU64::new(0),
        })
    }

    /// Kills so far, and whether there are more than at the last call.
    pub fn check(&self) -> (u64, bool) {
        let text = read_at_start(self.file.get_ref()).unwrap_or_default();
        let kills = keyed(&text, "oom_kill");
        let before = self.seen.swap(kills, Ordering::Relaxed);
        (kills, kills > before)
    }

    /// Waits until the kernel reports a change.
    pub async fn changed(&self) -> io::Result<()> {
        self.file.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// Hands every controller the kernel has to the containers' cgroups. Returns what failed.
pub fn enable_controllers() -> io::Result<Vec<String>> {
    let available = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))?;
    let control = Path::new(ROOT).join("cgroup.subtree_control");
    let enable = |names: &[&str]| {
        let words: Vec<String> = names.iter().map(|n| format!("+{n}")).collect();
        fs::write(&control, words.join(" "))
    };
    let names: Vec<&str> = available.split_ascii_whitespace().collect();
    if names.is_empty() || enable(&names).is_ok() {
        return Ok(Vec::new());
    }
    // One that cannot be enabled fails them all: find it.
    let failed = names
        .iter()
        .filter_map(|n| enable(&[n]).err().map(|e| format!("{n}: {e}")));
    Ok(failed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files_are_read_by_whole_keys() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(keyed(text, "oom_kill"), 2);
        assert_eq!(keyed(text, "oom"), 3);
        assert_eq!(keyed(text, "kill"), 0);
        assert_eq!(keyed("", "x"), 0);
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(single("max\n"), u64::MAX);
        assert_eq!(single("4096\n"), 4096);
        assert_eq!(single(""), 0);
    }

    #[test]
    fn no_container_is_named_like_a_control_file() {
        assert_eq!(
            path_of("cgroup.procs"),
            Path::new("/container-cgroup.procs")
        );
    }
}
