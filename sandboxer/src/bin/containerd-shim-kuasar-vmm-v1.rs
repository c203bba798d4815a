//! The program that containerd looks for under the name of the runtime type
//! `io.containerd.kuasar-vmm.v1`.
//!
//! Pods of that runtime are served by `vmm-sandboxer`, which containerd reaches as a proxy
//! plugin, and no process of this program runs beside them. containerd still resolves it when
//! it starts: without it, it deletes the bundles of running containers. It calls `delete`
//! when the daemon that served a container cannot be reached any more, to learn how the
//! container ended and to have its mounts undone.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use sandboxer::pod::KILLED;

const NAME: &str = "io.containerd.kuasar-vmm.v1";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What containerd asks for. Flags have one dash, as Go's have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    bundle: Option<PathBuf>,
    info: bool,
    version: bool,
    action: String,
}

impl Arguments {
    fn parse(given: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut given = given.into_iter();
        while let Some(word) = given.next() {
            let Some(flag) = word.strip_prefix('-') else {
                arguments.action = word;
                continue;
            };
            match flag.trim_start_matches('-') {
                "bundle" => arguments.bundle = given.next().map(PathBuf::from),
                "id" | "namespace" | "address" | "publish-binary" | "socket" => {
                    let _ = given.next();
                }
                "debug" => {}
                "info" => arguments.info = true,
                "v" => arguments.version = true,
                other => return Err(format!("unknown flag -{other}")),
            }
        }
        Ok(arguments)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("containerd-shim-kuasar-vmm-v1: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    let mut stdout = std::io::stdout();
    let bytes = if arguments.version {
        format!("{NAME} {VERSION}\n").into_bytes()
    } else if arguments.info {
        encode(&info())?
    } else {
        match arguments.action.as_str() {
            "delete" => {
                if let Some(bundle) = &arguments.bundle {
                    release(bundle)?;
                }
                encode(&deleted(SystemTime::now()))?
            }
            "start" => {
                return Err(
                    "pods of this runtime are served by vmm-sandboxer: set `sandboxer` of the \
                     runtime in containerd's configuration to the name of its proxy plugin"
                        .to_owned(),
                );
            }
            other => return Err(format!("{other:?} is neither start nor delete")),
        }
    };
    stdout
        .write_all(&bytes)
        .and_then(|()| stdout.flush())
        .map_err(|e| format!("cannot answer: {e}"))
}

fn encode(message: &impl Message) -> Result<Vec<u8>, String> {
    message.write_to_bytes().map_err(|e| e.to_string())
}

fn info() -> RuntimeInfo {
    RuntimeInfo {
        name: NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: VERSION.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn deleted(at: SystemTime) -> DeleteResponse {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    DeleteResponse {
        // Its VM has gone with its daemon.
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Undoes what may be mounted on the bundle's rootfs. Idempotent.
fn release(bundle: &Path) -> Result<(), String> {
    let rootfs = bundle.join("rootfs");
    loop {
        match umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // There may be another mount below.
            Ok(()) => {}
            // Not a mount point; no such file.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(format!("cannot unmount {}: {e}", rootfs.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = String> + '_ {
        text.split(' ').map(str::to_owned)
    }

    #[test]
    fn flags_have_one_dash_and_the_action_comes_last() {
        let given = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd \
                     -id abc -bundle /run/b -debug delete";
        let parsed = Arguments::parse(words(given)).unwrap();
        assert_eq!(parsed.bundle, Some(PathBuf::from("/run/b")));
        assert_eq!(parsed.action, "delete");
        assert!(Arguments::parse(words("-info")).unwrap().info);
        assert!(Arguments::parse(words("-v")).unwrap().version);
        Arguments::parse(words("-other start")).unwrap_err();
    }

    #[test]
    fn a_deleted_container_was_killed_now() {
        let now = SystemTime::now();
        let answer = deleted(now);
        assert_eq!(answer.exit_status, 137);
        assert_eq!(
            answer.exited_at.seconds,
            i64::try_from(now.duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
        );
    }

    #[test]
    fn a_bundle_without_mounts_is_released() {
        let bundle = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            match release(bundle.path()) {
                Ok(()) => {}
                Err(e) => println!("skipped: {e}"),
            }
        }
    }
}
