//! `kuasar-ctl debug-console`: a shell in a pod's guest, beside its containers.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_api::STREAM_PORT;
use agent_api::stream::{CONSOLE_OPEN, Header, TerminalSize};
use clap::Args;
use external_hv::vsock;

use super::args::Global;
use super::error::{CliError, Doing, Result};
use super::pods::{Found, find};
use super::terminal::{self, RawMode};

/// Name of the socket to the guest's ports in the pod's folder.
const VSOCK_SOCKET: &str = "vsock.sock";

/// For each step until the shell is there; guests can be slow.
const LIMIT: Duration = Duration::from_secs(60);

/// Longest refusal of the guest.
const MAX_ANSWER_BYTES: usize = 1024;

/// Opens a shell in a pod's guest: as root, beside the containers, for finding faults
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl debug-console web
  echo 'ps; dmesg | tail' | kuasar-ctl debug-console web

Off unless vm.debug_console in the daemon's configuration names a shell when the pod is made,
for instance /bin/busybox. With a terminal as stdin the shell has one, too; it keeps the size
that it began with.")]
pub(super) struct DebugConsoleArgs {
    /// Name or id of the pod, or the beginning of an id
    pod: String,
}

pub(super) async fn open(global: &Global, args: &DebugConsoleArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let tty = io::stdin().is_terminal();
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let size = match tty {
        true => TerminalSize { columns, rows },
        false => TerminalSize::NONE,
    };
    let stream = connect(&found).await?;
    let attended = tokio::task::spawn_blocking(move || {
        begin(&stream, size)?;
        // Raw only once the guest's terminal does what ours did.
        let raw = tty.then(RawMode::enter).transpose()?;
        let carried = carry(stream);
        drop(raw);
        carried
    });
    attended
        .await
        .map_err(|e| CliError::caused("the console failed", &e))?
}

async fn connect(found: &Found) -> Result<UnixStream> {
    let title = found.pod.title();
    let dir = found.dir().filter(|_| found.is_ready()).ok_or_else(|| {
        let why = found.failed().unwrap_or_default();
        CliError::new(format!("pod {title} does not run: {why}"))
    })?;
    let stream = vsock::connect(&dir.join(VSOCK_SOCKET), STREAM_PORT, LIMIT).await;
    let stream = stream.map_err(|e| {
        CliError::caused(format!("cannot reach the guest of pod {title}"), &e)
            .next("the daemon's configuration must not switch vm.vsock_uds off")
    })?;
    let doing = || "set up the connection".to_owned();
    let stream = stream.into_std().doing(doing)?;
    stream.set_nonblocking(false).doing(doing)?;
    stream.set_read_timeout(Some(LIMIT)).doing(doing)?;
    Ok(stream)
}

/// Asks for the shell.
fn begin(mut stream: &UnixStream, size: TerminalSize) -> Result<()> {
    let doing = || "open the debug console".to_owned();
    let header = format!("{}\n", Header::Console(size));
    stream.write_all(header.as_bytes()).doing(doing)?;
    let mut answer = Vec::new();
    // Not a byte further than the line: what follows is the shell's.
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
        let mut byte = [0];
        stream.read_exact(&mut byte).doing(doing)?;
        answer.extend(byte);
    }
    if answer != CONSOLE_OPEN {
        return Err(CliError::new(String::from_utf8_lossy(&answer).trim_end()));
    }
    stream.set_read_timeout(None).doing(doing)
}

/// Passes bytes both ways until the shell ends.
fn carry(mut stream: UnixStream) -> Result<()> {
    let mut input = stream.try_clone().doing(|| "pass input on".to_owned())?;
    // A thread of its own: a read from a terminal cannot be cancelled.
    let copying = std::thread::Builder::new().name("stdin".to_owned());
    let copy = move || {
        // The shell may be gone already.
        let _ = io::copy(&mut io::stdin().lock(), &mut input);
        let _ = input.shutdown(Shutdown::Write);
    };
    copying.spawn(copy).doing(|| "pass input on".to_owned())?;
    let mut out = io::stdout();
    let mut chunk = [0; 4096];
    loop {
        let read = match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            // The guest has ended, and the shell with it.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(CliError::caused("cannot read from the console", &e)),
        };
        let part = chunk.get(..read).unwrap_or_default();
        let written = out.write_all(part).and_then(|()| out.flush());
        written.doing(|| "write to stdout".to_owned())?;
    }
}
