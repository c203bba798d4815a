//! `kuasar-e2e`: goes through the rows and prints a table.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use conformance::report::{self, Report};
use conformance::{Backend, Mode, ROWS, Row, Setup, Skipped, Snapshotter, Suite, soak};

/// Shows through CRI what a container runtime does of what it has to do
///
/// Without --runtime-endpoint it starts a containerd and a daemon of its own, in temporary
/// folders and a network namespace.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Go through the rows
    Run {
        /// Which rows: `all`, `core`, or numbers and ranges such as 1,7-9
        #[arg(default_value = "all", value_parser = select)]
        rows: Rows,
        /// Also write the table to this file, in Markdown
        #[arg(long, value_name = "FILE")]
        markdown: Option<PathBuf>,
        #[command(flatten)]
        on: On,
    },
    /// Start and remove many pods, and check that nothing is left
    Soak {
        /// Pods one after the other
        #[arg(long, default_value_t = 100)]
        sequential: u32,
        /// Pods at once, after that
        #[arg(long, default_value_t = 30)]
        parallel: u32,
        #[command(flatten)]
        on: On,
    },
    /// List the rows
    List,
}

#[derive(Debug, Args)]
struct On {
    /// How containerd reaches the daemon
    #[arg(long, value_enum, default_value_t = Mode::Proxy)]
    mode: Mode,
    /// What runs the VMs
    #[arg(long, value_enum, default_value_t = Backend::InProcess)]
    backend: Backend,
    /// What containerd keeps layers of images as
    #[arg(long, value_enum, default_value_t = Snapshotter::Overlayfs)]
    snapshotter: Snapshotter,
    /// CRI's socket of an installed node; then the options above mean nothing
    #[arg(long, value_name = "SOCKET")]
    runtime_endpoint: Option<PathBuf>,
    /// Runtime handler of the installed node
    #[arg(long, value_name = "NAME", default_value = "kuasar-vmm")]
    runtime_handler: String,
    /// Image that the installed node has, with a shell and the tools of busybox
    #[arg(
        long,
        value_name = "IMAGE",
        default_value = "docker.io/library/busybox:latest"
    )]
    image: String,
}

impl On {
    fn setup(&self) -> Setup {
        match &self.runtime_endpoint {
            Some(endpoint) => Setup::Installed {
                endpoint: endpoint.clone(),
                handler: self.runtime_handler.clone(),
                image: self.image.clone(),
            },
            None => Setup::Own {
                mode: self.mode,
                backend: self.backend,
                snapshotter: self.snapshotter,
            },
        }
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run { rows, markdown, on } => run(rows, markdown, &on.setup()),
        Command::Soak {
            sequential,
            parallel,
            on,
        } => soak::soak(&on.setup(), sequential, parallel).map(|()| true),
        Command::List => {
            for row in ROWS {
                say(&format!("{:>3}  {}", row.number, row.name));
            }
            Ok(true)
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Skipped(why)) => {
            say(&format!("skipped: {why}"));
            ExitCode::SUCCESS
        }
    }
}

fn say(line: &str) {
    // Whoever reads no more has seen enough.
    let _ = writeln!(anstream::stdout(), "{line}");
}

fn run(rows: Rows, markdown: Option<PathBuf>, setup: &Setup) -> Result<bool, Skipped> {
    let suite = Suite::start(setup)?;
    let mut report = Report::default();
    for row in rows.0 {
        let begun = Instant::now();
        let verdict = suite.run(&row);
        let seconds = begun.elapsed().as_secs_f64();
        say(&report::line(&row, &verdict, seconds));
        report.add(row, verdict);
    }
    say(&report.summary());
    if let Some(file) = markdown
        && let Err(e) = std::fs::write(&file, report.markdown())
    {
        return Err(Skipped(format!("cannot write {}: {e}", file.display())));
    }
    if report.failed() == 0 {
        suite.finish();
    }
    Ok(report.failed() == 0)
}

/// Rows, in their order.
#[derive(Clone, Debug)]
struct Rows(Vec<Row>);

/// The rows that `which` names.
fn select(which: &str) -> Result<Rows, String> {
    let rows = ROWS.iter().copied();
    match which {
        "all" => return Ok(Rows(rows.collect())),
        "core" => return Ok(Rows(rows.filter(|row| row.core).collect())),
        _ => {}
    }
    let wrong = || "give all, core, or numbers and ranges of rows such as 1,7-9".to_owned();
    let mut ranges = Vec::new();
    for part in which.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        ranges.push(number(first)?..=number(last)?);
    }
    let rows: Vec<_> = rows
        .filter(|row| ranges.iter().any(|range| range.contains(&row.number)))
        .collect();
    if rows.is_empty() {
        return Err(wrong());
    }
    Ok(Rows(rows))
}
