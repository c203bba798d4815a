//! The action `start`: see that a process serves the pod, and say where.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::address::{self, Bound};
use crate::arguments::Arguments;
use crate::bundle::Spec;
use crate::rpc::version::version_client::VersionClient;
use crate::{Error, Runtime, daemon, runtime, settings};

/// How long containerd may take to say which version it is.
const LIMIT: Duration = Duration::from_secs(3);

/// Returns what containerd wants to read: the address, with a version where it knows that.
///
/// # Errors
/// The process cannot be started.
pub(crate) fn start(runtime: &Runtime, arguments: &Arguments) -> Result<String, Error> {
    if !runtime.serves {
        return Err(Error::Usage(format!(
            "pods of this runtime are served by {daemon} alone: set `sandboxer` of the runtime in \
             containerd's configuration to the name of its proxy plugin, or use the runtime type \
             {v2}",
            daemon = runtime.daemon,
            v2 = runtime.name.replace(".v1", ".v2"),
        )));
    }
    let sandboxer = settings::sandboxer(runtime, arguments)?;
    let bundle = std::env::current_dir().map_err(Error::io("finding the bundle"))?;
    let spec = Spec::read(&bundle);
    let group = spec.group().unwrap_or(&arguments.id);
    let socket = address::socket(&arguments.address, &arguments.namespace, group);
    if let Bound::Ours(listener) = address::bind(&socket)? {
        spawn(arguments, group, &sandboxer, &socket, listener.into())?;
    }
    let url = format!("unix://{}", socket.display());
    // containerd 1.7 looks for it here when it comes to the pod's containers.
    let file = bundle.join("address");
    std::fs::write(&file, &url).map_err(Error::io(format!("writing {}", file.display())))?;
    Ok(if takes_v3(&arguments.address) {
        format!(r#"{{"version":3,"address":"{url}","protocol":"ttrpc"}}"#)
    } else {
        url
    })
}

/// Starts this program again as the process that stays. Its stdin is the socket; it gets
/// neither our stdout nor our stderr, since containerd reads both to their end.
fn spawn(
    arguments: &Arguments,
    group: &str,
    sandboxer: &Path,
    socket: &Path,
    listener: OwnedFd,
) -> Result<(), Error> {
    let this = std::env::current_exe().map_err(Error::io("finding this program"))?;
    let mut command = Command::new(this);
    command
        .args(["-namespace", &arguments.namespace, "-id", group])
        .args(["-address", &arguments.address])
        .arg("-sandboxer")
        .arg(sandboxer)
        .arg("-socket")
        .arg(socket);
    if arguments.debug {
        command.arg("-debug");
    }
    command
        .arg("serve")
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
        .map_err(Error::io("starting the process that serves the pod"))
}

/// Whether this containerd knows version 3 of the Task API. Neither arguments nor environment
/// tell, and 1.7 refuses an answer with it; version 2 is understood by all.
fn takes_v3(address: &str) -> bool {
    if address.is_empty() {
        return false;
    }
    let asked = async {
        let channel = daemon::channel(Path::new(address)).ok()?;
        let mut client = VersionClient::new(channel);
        let answer = client.version(());
        let answer = tokio::time::timeout(LIMIT, answer).await.ok()?.ok()?;
        Some(answer.into_inner().version)
    };
    runtime()
        .ok()
        .and_then(|runtime| runtime.block_on(asked))
        .is_some_and(|version| is_2(&version))
}

fn is_2(version: &str) -> bool {
    let digits = version.trim_start_matches('v');
    let major = digits
        .split(['.', '-', '~', '+'])
        .next()
        .unwrap_or_default();
    major.parse::<u32>().is_ok_and(|major| major >= 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_containerd_are_told_apart() {
        for (version, expected) in [
            ("2.1.9~ds1", true),
            ("v2.0.0-rc.1", true),
            ("v3.0", true),
            ("1.7.24~ds1", false),
            ("v1.7.0", false),
            ("", false),
            ("unknown", false),
        ] {
            assert_eq!(is_2(version), expected, "{version}");
        }
    }
}
