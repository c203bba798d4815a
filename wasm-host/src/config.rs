//! What a host and its containers are given.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What all containers of a host share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Most core instances at once. A component has a few, a module one.
    pub max_instances: u32,
    /// Largest linear memory, in bytes; address space of that size is reserved for each
    /// instance.
    pub max_memory_bytes: u64,
    /// Most linear memory of all containers together, in bytes.
    pub total_memory_bytes: u64,
    /// Largest file that is taken for a program, in bytes.
    pub max_program_bytes: u64,
    /// Compiled programs kept in memory while no container runs them.
    pub keep_programs: usize,
    /// Programs compiled at once.
    pub compilations: usize,
    /// Where compiled code is kept; `None`: in memory only.
    pub cache: Option<CacheConfig>,
}

/// Where compiled code is kept between runs. Whoever can write both can run code in this
/// process: give them to its user only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Folder of the files; made when missing, for this user only.
    pub dir: PathBuf,
    /// File with the key that authenticates them, outside of `dir`; made when missing.
    pub key: PathBuf,
    /// Most bytes in the folder; what was used longest ago goes first.
    pub max_bytes: u64,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            max_instances: 4096,
            max_memory_bytes: 4 << 30,
            total_memory_bytes: 16 << 30,
            max_program_bytes: 256 << 20,
            keep_programs: 64,
            compilations: std::thread::available_parallelism().map_or(1, usize::from),
            cache: None,
        }
    }
}

/// What one container may use. `Default` limits nothing but what keeps a host alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Linear memory of all its instances, in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU time in each period.
    pub cpu_quota: Option<CpuQuota>,
    /// Weight beside other containers on the same lane, as in `cpu.shares`; 1024 is usual.
    pub cpu_shares: u64,
    /// Time from start to a forced end.
    pub wall_time: Option<Duration>,
    /// Elements of a table.
    pub table_elements: usize,
    /// Core instances of one program.
    pub instances: usize,
    /// Tables of one program.
    pub tables: usize,
    /// Linear memories of one program.
    pub memories: usize,
    /// Handles of one program: open files, sockets, streams and what waits for them.
    pub handles: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: None,
            cpu_quota: None,
            cpu_shares: 1024,
            wall_time: None,
            table_elements: 100_000,
            instances: 32,
            tables: 32,
            memories: 16,
            handles: 4096,
        }
    }
}

/// As in `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuQuota {
    /// CPU time in each period.
    pub quota: Duration,
    /// Length of a period.
    pub period: Duration,
}

/// A folder of the host that a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// On the host.
    pub host: PathBuf,
    /// In the container, absolute.
    pub guest: String,
    /// Whether nothing can be changed through it.
    pub read_only: bool,
}

/// Which of the network a container sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// None of it.
    #[default]
    Denied,
    /// All that the lane's network namespace has.
    Namespace,
}

/// What a container runs with. `Default` gives it nothing.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Arguments; the first is the name of the program.
    pub args: Vec<String>,
    /// Environment, in order.
    pub env: Vec<(String, String)>,
    /// Working directory, in the container. Preview 1 has none: such programs begin in `/`.
    pub cwd: Option<String>,
    /// Folders it sees.
    pub mounts: Vec<Mount>,
    /// Sockets and names.
    pub network: Network,
    /// Where `wasi:http/proxy` components serve; `None`: port 8080 of every address.
    pub http_listen: Option<SocketAddr>,
    /// What it may use.
    pub limits: Limits,
}
