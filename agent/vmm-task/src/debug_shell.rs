//! The debug console: a shell in the guest itself, beside the containers.
//!
//! Off unless the kernel parameter `task.debug_shell` names a program.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use agent_api::stream::{CONSOLE_OPEN, TerminalSize};
use nix::pty::openpty;
use tokio::io::{copy, copy_bidirectional};
use tracing::{info, warn};

use crate::fd::Fd;
use crate::sys;

/// Answers the host with one line, then carries bytes between it and a shell.
pub async fn serve(shell: Option<&Path>, size: TerminalSize, mut host: Fd, head: &[u8]) {
    let begun = match shell {
        Some(shell) => {
            begin(shell, size).map_err(|e| format!("{} cannot run: {e}", shell.display()))
        }
        None => Err("the debug console is off: set vm.debug_console for new pods".to_owned()),
    };
    let ours = match begun {
        Ok(ours) => ours,
        Err(why) => {
            warn!("debug console refused: {why}");
            // A host that has gone needs no answer.
            let _ = host.write_all(format!("{why}\n").as_bytes()).await;
            return;
        }
    };
    info!("debug console opened");
    if let Err(e) = carry(host, ours, head, size).await {
        // A terminal whose last program has ended reads as an error.
        info!("debug console ended: {e}");
    }
}

async fn carry(mut host: Fd, mut ours: Fd, head: &[u8], size: TerminalSize) -> io::Result<()> {
    host.write_all(CONSOLE_OPEN).await?;
    ours.write_all(head).await?;
    if size == TerminalSize::NONE {
        // Either side may end first: input from a pipe ends before what it asks for is done.
        return copy_bidirectional(&mut host, &mut ours).await.map(drop);
    }
    let (mut host_in, mut host_out) = tokio::io::split(host);
    let (mut tty_out, mut tty_in) = tokio::io::split(ours);
    // A terminal cannot be half-closed: with the host it hangs up.
    tokio::select! {
        copied = copy(&mut host_in, &mut tty_in) => copied?,
        copied = copy(&mut tty_out, &mut host_out) => copied?,
    };
    Ok(())
}

/// Starts the shell; returns our end of its terminal or socket. The reaper collects it.
fn begin(shell: &Path, size: TerminalSize) -> io::Result<Fd> {
    let (ours, theirs): (OwnedFd, OwnedFd) = if size == TerminalSize::NONE {
        let (ours, theirs) = UnixStream::pair()?;
        (ours.into(), theirs.into())
    } else {
        let pty = openpty(None, None)?;
        sys::set_window_size(&pty.master, size.columns, size.rows)?;
        sys::close_on_exec(&pty.master)?;
        sys::close_on_exec(&pty.slave)?;
        (pty.master, pty.slave)
    };
    let mut command = Command::new(shell);
    command
        // What it is called decides what programs such as busybox are.
        .arg0("sh")
        .current_dir("/")
        .env("HOME", "/")
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .env("TERM", "linux")
        .stdin(File::from(theirs.try_clone()?))
        .stdout(File::from(theirs.try_clone()?))
        .stderr(Stdio::from(File::from(theirs)));
    sys::lead_session(&mut command, size != TerminalSize::NONE);
    command.spawn()?;
    Fd::from_blocking(ours)
}
