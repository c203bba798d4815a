//! `kuasar-ctl pause`, `resume`, `snapshot` and `restore`: pods that stand still, in memory or
//! on disk.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::args::{FreezeArgs, Global, RestoreArgs, SnapshotArgs};
use super::client::Controller;
use super::error::{CliError, Doing, Result};
use super::output;
use super::pods::{Found, find};

/// Where a pod's snapshot is kept, in the pod's own folder, unless the user says otherwise.
const SNAPSHOT: &str = "snapshot";

pub(super) async fn pause(global: &Global, args: &FreezeArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    controller(&found)?.pause(&found.pod.id).await?;
    tell("paused", &found, args.json)
}

pub(super) async fn resume(global: &Global, args: &FreezeArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    controller(&found)?.resume(&found.pod.id).await?;
    tell("resumed", &found, args.json)
}

pub(super) async fn snapshot(global: &Global, args: &SnapshotArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let controller = controller(&found)?;
    let dir = folder(&found, args.to.as_deref())?;
    let base = args.base.as_deref().map(absolute).transpose()?;
    let made = make_empty(&dir)?;
    let id = &found.pod.id;
    let saved = controller.snapshot(id, &dir, base.as_deref(), args.keep_running);
    if let Err(e) = saved.await {
        if made && let Err(e) = std::fs::remove_dir_all(&dir) {
            output::note(&format!("cannot remove {}: {e}", dir.display()));
        }
        return Err(e);
    }
    if args.json {
        return output::json(&json!({ "snapshot": id, "dir": dir }));
    }
    output::line(&dir.display().to_string())
}

pub(super) async fn restore(global: &Global, args: &RestoreArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let dir = folder(&found, args.from.as_deref())?;
    let id = controller(&found)?.restore(&dir).await?;
    if args.from.is_none() {
        // It has served: the pod goes on from here, and a second one of it must not.
        std::fs::remove_dir_all(&dir).doing(|| format!("remove {}", dir.display()))?;
    }
    if args.json {
        return output::json(&json!({ "restored": id }));
    }
    output::line(&id)
}

fn controller(found: &Found) -> Result<&Controller> {
    found.pod.controller.as_ref().ok_or_else(|| {
        CliError::new(format!(
            "no daemon has pod {}, or it does not run",
            found.pod.title()
        ))
        .next("start vmm-sandboxer, and name its socket with --address if it is not the default")
    })
}

fn tell(verb: &str, found: &Found, as_json: bool) -> Result<()> {
    if as_json {
        return output::json(&json!({ verb: found.pod.id }));
    }
    output::line(&found.pod.id)
}

fn folder(found: &Found, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return absolute(dir);
    }
    let record = found.pod.record.as_ref();
    record.map(|r| r.data.join(SNAPSHOT)).ok_or_else(|| {
        CliError::new(format!(
            "pod {} was not made by kuasar-ctl: there is no folder for its snapshot",
            found.pod.title()
        ))
        .next("name one with --to or --from")
    })
}

fn absolute(dir: &Path) -> Result<PathBuf> {
    std::path::absolute(dir).doing(|| format!("find {}", dir.display()))
}

/// Makes the folder, if it is not there; whether it did.
fn make_empty(dir: &Path) -> Result<bool> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(true),
        // The daemon looks whether it is empty.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        made => made
            .map(|()| true)
            .doing(|| format!("create {}", dir.display())),
    }
}
