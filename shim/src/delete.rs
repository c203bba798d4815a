//! The action `delete`: clean up after a pod or container that nobody serves any more.
//!
//! containerd calls it whenever the connection to a shim closes, so also after every orderly
//! end, and gives it 5 s.

use std::time::{Duration, SystemTime};

use prost::Message;

use crate::arguments::Arguments;
use crate::bundle::{self, Spec};
use crate::daemon::Daemon;
use crate::rpc::printed::DeleteResponse;
use crate::{Error, Runtime, address, runtime, settings};

/// 128 + SIGKILL.
pub(crate) const KILLED: u32 = 137;

/// How long the daemon may take to end a pod. It carries on if it takes longer.
const LIMIT: Duration = Duration::from_secs(3);

/// Returns what containerd wants to read: how it ended.
///
/// # Errors
/// Something is left that containerd should know of.
pub(crate) fn delete(runtime: &Runtime, arguments: &Arguments) -> Result<Vec<u8>, Error> {
    if let Some(bundle) = &arguments.bundle {
        let own_pod = Spec::read(bundle)
            .group()
            .is_none_or(|group| group == arguments.id);
        if runtime.serves && own_pod {
            end_pod(runtime, arguments)?;
        }
        bundle::release(bundle)?;
    }
    let answer = DeleteResponse {
        pid: 0,
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()),
    };
    Ok(answer.encode_to_vec())
}

/// Ends the pod whose shim has gone. A daemon that is down has no pods, or finds them when it
/// comes back.
fn end_pod(program: &Runtime, arguments: &Arguments) -> Result<(), Error> {
    let sandboxer = settings::sandboxer(program, arguments)?;
    let ended = async {
        let daemon = Daemon::new(program.daemon, &sandboxer)?;
        tokio::time::timeout(LIMIT, daemon.shutdown(&arguments.id))
            .await
            .unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded(format!("over {LIMIT:?}"))))
    };
    if let Err(status) = runtime()?.block_on(ended) {
        eprintln!("{}: {}", program.program, status.message());
    }
    let socket = address::socket(&arguments.address, &arguments.namespace, &arguments.id);
    // Whoever listens there is another pod's, and has replaced it.
    if std::os::unix::net::UnixStream::connect(&socket).is_err() {
        let _ = std::fs::remove_file(&socket);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: Runtime = Runtime {
        program: "containerd-shim-test-v1",
        name: "io.containerd.test.v1",
        key: "vmm",
        daemon: "test",
        socket: "/nonexistent",
        serves: false,
    };

    #[test]
    fn a_deleted_container_was_killed_now() {
        let arguments = Arguments::default();
        let now = SystemTime::now();
        let answer = delete(&V1, &arguments).unwrap();
        let answer = DeleteResponse::decode(answer.as_slice()).unwrap();
        assert_eq!(answer.exit_status, 137);
        let at = SystemTime::try_from(answer.exited_at.unwrap()).unwrap();
        assert!(at >= now);
    }
}
