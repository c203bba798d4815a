//! Moves bytes between host and guest.

use std::future::Future;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tracing::debug;
use vmm_core::vm::GuestStream;

use super::input::Input;
use super::output::Output;

/// One copy's buffer: what a fifo holds.
const BUFFER_BYTES: usize = 64 * 1024;

/// Copies until the guest closes the stream, or until the process has exited and nothing
/// came for `drain`. The host's end is closed then.
pub(super) async fn output(
    mut guest: Box<dyn GuestStream>,
    host: Output,
    mut exited: watch::Receiver<bool>,
    drain: Duration,
) {
    let mut writer = host.into_writer();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut failed = false;
    loop {
        let after_exit = *exited.borrow_and_update();
        let read = tokio::select! {
            biased;
            read = guest.read(&mut buffer) => read,
            // From now on silence has a limit.
            Ok(()) = exited.changed(), if !after_exit => continue,
            () = tokio::time::sleep(drain), if after_exit => break,
        };
        let chunk = match read {
            Ok(0) => break,
            Ok(n) => buffer.get(..n).unwrap_or_default(),
            Err(e) => {
                debug!("output stream ended: {e}");
                break;
            }
        };
        // Keep reading after a failure: a process must not block on a full disk of the host.
        if !failed && let Err(e) = writer.write_all(chunk).await {
            debug!("cannot write output: {e}");
            failed = true;
        }
    }
    if let Err(e) = writer.flush().await {
        debug!("cannot write output: {e}");
    }
}

/// Copies until stdin ends on the host, then runs `ended`; gives up when the guest takes no
/// more or the process has exited.
pub(super) async fn input(
    host: Input,
    mut guest: Box<dyn GuestStream>,
    mut exited: watch::Receiver<bool>,
    ended: impl Future<Output = ()>,
) {
    let mut reader = host.into_reader();
    let copy = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match reader.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => {
                    let chunk = buffer.get(..n).unwrap_or_default();
                    if guest.write_all(chunk).await.is_err() {
                        return;
                    }
                }
                Err(e) => {
                    debug!("stdin ended: {e}");
                    break;
                }
            }
        }
        // Half-close: the process sees the end after everything sent before.
        if let Err(e) = guest.shutdown().await {
            debug!("cannot close stdin of the guest: {e}");
        }
        ended.await;
        // The stream itself stays open while the agent reads what is under way.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = copy => {}
        _ = exited.wait_for(|exited| *exited) => {}
    }
}
