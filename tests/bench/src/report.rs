//! The table on the terminal and the JSON file beside it.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use humantime_serde::re::humantime;
use serde::Serialize;
use vmm_core::Host;

use crate::{median, p99};

/// Ourselves, among the subjects.
pub const OURS: &str = "kuasar-embed";

/// One measured quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Who was measured: ourselves or a peer.
    pub subject: String,
    /// Unit of every sample.
    pub unit: &'static str,
    /// One per run, in order.
    pub samples: Vec<f64>,
    /// Middle of the samples.
    pub median: Option<f64>,
    /// 99 of 100 samples are no larger; only of [`ENOUGH`] samples or more.
    pub p99: Option<f64>,
}

/// Fewest samples whose 99th percentile is told.
const ENOUGH: usize = 50;

/// A finished benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the benchmark; also of its JSON file.
    pub name: &'static str,
    /// "emulated ring 0" or "hardware".
    pub host_kind: &'static str,
    /// When it began, in UTC.
    pub date: String,
    /// How it was called.
    pub command: String,
    /// CPU model, CPUs and kernel release.
    pub host: String,
    /// Version of each subject.
    pub versions: Vec<(String, String)>,
    /// What could not be measured, and why.
    pub skipped: Vec<String>,
    /// Everything that was measured.
    pub figures: Vec<Figure>,
}

impl Report {
    /// An empty report on this host, by this program with its arguments.
    #[must_use]
    pub fn new(name: &'static str, host: &Host) -> Self {
        let host_kind = if host.emulated_ring0() {
            "emulated ring 0"
        } else {
            "hardware"
        };
        Self::without_vms(name, host_kind)
    }

    /// As [`Report::new`], for a benchmark to which the kind of host means something else.
    #[must_use]
    pub fn without_vms(name: &'static str, host_kind: &'static str) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|l| {
                l.strip_prefix("model name")
                    .map(|m| m.trim_matches([' ', '\t', ':']).to_owned())
            })
            .unwrap_or_else(|| "unknown CPU".to_owned());
        let kernel = read("/proc/sys/kernel/osrelease");
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let host = format!("{cpu}, {cpus} CPUs, Linux {}", kernel.trim());
        let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let versions = vec![(OURS.to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
        Self {
            name,
            host_kind,
            date,
            command: std::env::args().collect::<Vec<_>>().join(" "),
            host,
            versions,
            skipped: Vec::new(),
            figures: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn add(&mut self, subject: &str, name: &str, unit: &'static str, samples: Vec<f64>) {
        let median = median(&samples);
        let p99 = (samples.len() >= ENOUGH).then(|| p99(&samples)).flatten();
        let (name, subject) = (name.to_owned(), subject.to_owned());
        self.figures.push(Figure {
            name,
            subject,
            unit,
            samples,
            median,
            p99,
        });
    }

    /// Prints the table: a line per quantity, a column per subject, and for quantities that a
    /// peer has too, how many times ours it takes.
    pub fn print(&self) {
        println!("\n{}: {} ({})", self.name, self.host, self.host_kind);
        println!("  {}, {}", self.date, self.command);
        for (subject, version) in &self.versions {
            println!("  {subject}: {version}");
        }
        println!();
        println!(
            "{:<34} {:<18} {:>12} {:>10} {:<8} {:>9}",
            "what", "who", "median", "p99", "unit", "vs ours"
        );
        for figure in &self.figures {
            let Some(value) = figure.median else { continue };
            let ours = self
                .figures
                .iter()
                .find(|f| f.name == figure.name && !self.is_peer(f))
                .and_then(|f| f.median);
            let ratio = match ours {
                Some(ours) if ours > 0.0 && self.is_peer(figure) => format!("{:.2}x", value / ours),
                _ => String::new(),
            };
            let p99 = figure.p99.map_or_else(String::new, |p| format!("{p:.2}"));
            println!(
                "{:<34} {:<18} {value:>12.2} {p99:>10} {:<8} {ratio:>9}",
                figure.name, figure.subject, figure.unit
            );
        }
        for line in &self.skipped {
            println!("skipped: {line}");
        }
    }

    fn is_peer(&self, figure: &Figure) -> bool {
        self.figures
            .first()
            .is_some_and(|first| first.subject != figure.subject)
    }

    /// Writes `target/bench/<name>.json` and returns its path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self) -> std::io::Result<PathBuf> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
        std::fs::create_dir_all(&dir)?;
        let path = dir.canonicalize()?.join(format!("{}.json", self.name));
        std::fs::write(&path, serde_json::to_vec_pretty(self)?)?;
        Ok(path)
    }
}
