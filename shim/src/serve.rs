//! The action `serve`: the process that stays with the pod.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::arguments::Arguments;
use crate::daemon::Daemon;
use crate::log::Log;
use crate::sandbox::Sandbox;
use crate::{Error, Runtime, proxy, runtime};

/// Serves connections on the socket that is our stdin until the pod is shut down.
///
/// # Errors
/// stdin is no such socket.
pub(crate) fn serve(program: &Runtime, arguments: &Arguments) -> Result<(), Error> {
    // Signals for containerd's group and terminal are not for us.
    let _ = rustix::process::setsid();
    let bundle = std::env::current_dir().map_err(Error::io("finding the bundle"))?;
    let log = Arc::new(Log::open(&bundle, &arguments.id, arguments.debug));
    // The bundle goes before we do.
    std::env::set_current_dir("/").map_err(Error::io("leaving the bundle"))?;
    let listener = listener().map_err(Error::io("taking over the socket on stdin"))?;
    let socket = arguments.sandboxer.clone();
    let socket = socket.unwrap_or_else(|| program.socket.into());
    let served = runtime()?.block_on(async {
        let listener = UnixListener::from_std(listener)
            .map_err(Error::io("listening on the socket on stdin"))?;
        let daemon = Daemon::new(program.daemon, &socket)
            .map_err(|status| Error::Settings(status.message().to_owned()))?;
        let sandbox = Arc::new(Sandbox::new(&arguments.id, daemon, Arc::clone(&log)));
        accept(&listener, &sandbox, &log).await;
        Ok(())
    });
    if let Some(socket) = &arguments.socket {
        remove(socket, &log);
    }
    served
}

fn listener() -> std::io::Result<StdListener> {
    let listener = StdListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // Fails unless it is a socket.
    listener.local_addr()?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn accept(listener: &UnixListener, sandbox: &Arc<Sandbox>, log: &Arc<Log>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = sandbox.ended() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((connection, _)) => {
                    let proxy = proxy::serve(connection, Arc::clone(sandbox), Arc::clone(log));
                    connections.spawn(proxy);
                }
                Err(e) => log.warn(&format!("a connection was not accepted: {e}")),
            },
        }
    }
}

fn remove(socket: &Path, log: &Log) {
    if let Err(e) = std::fs::remove_file(socket)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        log.warn(&format!("{} remains: {e}", socket.display()));
    }
}
