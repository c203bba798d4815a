//! `kuasar-ctl logs`: what a detached container wrote, or the guest's console.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::args::{Global, LogsArgs};
use super::client::ProcessName;
use super::error::{CliError, Doing, Result};
use super::pods::{Found, find};

/// The guest's serial console, in the pod's folder.
const CONSOLE: &str = "console.log";
const CHUNK_BYTES: usize = 64 << 10;
const NOTICE_BYTES: usize = 4096;

pub(super) async fn logs(global: &Global, args: &LogsArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let mut logs = if args.console {
        vec![Log::open(&console(&found)?, Box::new(io::stdout()))?]
    } else {
        let data = output_folder(&found)?;
        vec![
            Log::open(&data.join("stdout.log"), Box::new(io::stdout()))?,
            Log::open(&data.join("stderr.log"), Box::new(io::stderr()))?,
        ]
    };
    if args.follow && found.is_ready() {
        follow(&mut logs, &found, args.console).await?;
    }
    logs.iter_mut().try_for_each(Log::copy)
}

fn console(found: &Found) -> Result<PathBuf> {
    match found.dir() {
        Some(dir) => Ok(dir.join(CONSOLE)),
        None => Err(CliError::new(format!(
            "the console of pod {} is gone with its daemon",
            found.pod.title()
        ))),
    }
}

fn output_folder(found: &Found) -> Result<PathBuf> {
    let title = found.pod.title();
    match &found.pod.record {
        Some(record) if record.detached => Ok(record.data.clone()),
        Some(_) => Err(CliError::new(format!(
            "pod {title} runs in the foreground of another kuasar-ctl, which shows its output"
        ))
        .next("use `run --detach` for a pod that keeps a log")),
        None => Err(CliError::new(format!(
            "pod {title} was not started by this CLI, which has no log of it"
        ))
        .next("ask whoever started it, for instance `crictl logs`")),
    }
}

/// Copies as the files grow, until the container (for the console: the pod) has ended.
async fn follow(logs: &mut [Log], found: &Found, console: bool) -> Result<()> {
    let mut changes = watch(logs)?;
    let ended = ended(found, console);
    tokio::pin!(ended);
    loop {
        logs.iter_mut().try_for_each(Log::copy)?;
        tokio::select! {
            result = &mut ended => return result,
            Some(()) = changes.recv() => {}
        }
    }
}

async fn ended(found: &Found, console: bool) -> Result<()> {
    match &found.pod.controller {
        Some(controller) if console => controller.wait(&found.pod.id).await,
        _ => {
            let name = ProcessName {
                container: found.container(None)?,
                exec: String::new(),
            };
            found.task().await?.wait(&name).await.map(drop)
        }
    }
}

/// Tells of changes to the logs. The thread that waits for them ends with this process, or
/// at the first change that nobody wants to hear of.
fn watch(logs: &[Log]) -> Result<mpsc::Receiver<()>> {
    let doing = || "watch the log".to_owned();
    let notices = inotify::init(inotify::CreateFlags::CLOEXEC).doing(doing)?;
    for log in logs.iter().filter(|log| log.file.is_some()) {
        inotify::add_watch(&notices, &log.path, inotify::WatchFlags::MODIFY).doing(doing)?;
    }
    // One place is enough: it says that something changed, not what.
    let (tell, changes) = mpsc::channel(1);
    let wait = move || {
        let mut buffer = [0; NOTICE_BYTES];
        while rustix::io::read(&notices, &mut buffer).is_ok() {
            if let Err(TrySendError::Closed(())) = tell.try_send(()) {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("logs".to_owned())
        .spawn(wait)
        .doing(doing)?;
    Ok(changes)
}

/// A log file and where its content goes.
struct Log {
    path: PathBuf,
    file: Option<File>,
    to: Box<dyn Write>,
}

impl Log {
    /// A log nothing was written to yet may not exist.
    fn open(path: &Path, to: Box<dyn Write>) -> Result<Self> {
        let file = match File::open(path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => {
                return Err(CliError::caused(
                    format!("cannot open {}", path.display()),
                    &e,
                ));
            }
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            to,
        })
    }

    /// Copies what was added since the last time.
    fn copy(&mut self) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let read = file
                .read(&mut buffer)
                .doing(|| format!("read {}", self.path.display()))?;
            if read == 0 {
                break;
            }
            match self.to.write_all(buffer.get(..read).unwrap_or_default()) {
                // Whoever read our output has seen enough.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
                other => other.doing(|| "write the log".to_owned())?,
            }
        }
        self.to.flush().doing(|| "write the log".to_owned())
    }
}
