//! `kuasar-ctl stop` and `rm`.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use super::args::{Global, RmArgs, StopArgs};
use super::client::{ProcessName, Task};
use super::error::{CliError, Result};
use super::output;
use super::pods::{Found, find};
use super::store::PodStore;

pub(super) async fn stop(global: &Global, args: &StopArgs) -> Result<()> {
    let mut stopped = Vec::new();
    let mut failed = None;
    for wanted in &args.pods {
        match stop_one(global, wanted, args.time).await {
            Ok(id) => stopped.push(id),
            Err(e) => keep(&mut failed, e),
        }
    }
    finish("stopped", &stopped, args.json, failed)
}

pub(super) async fn rm(global: &Global, args: &RmArgs) -> Result<()> {
    let mut removed = Vec::new();
    let mut failed = None;
    for wanted in &args.pods {
        match remove_one(global, wanted, args.force).await {
            Ok(id) => removed.push(id),
            Err(e) => keep(&mut failed, e),
        }
    }
    finish("removed", &removed, args.json, failed)
}

/// One failure does not keep the other pods from being handled; the last one is returned.
fn keep(failed: &mut Option<CliError>, error: CliError) {
    if let Some(earlier) = failed.replace(error) {
        output::error(&earlier);
    }
}

fn finish(verb: &str, ids: &[String], as_json: bool, failed: Option<CliError>) -> Result<()> {
    if as_json {
        output::json(&json!({ verb: ids }))?;
    } else {
        ids.iter().try_for_each(|id| output::line(id))?;
    }
    failed.map_or(Ok(()), Err)
}

async fn stop_one(global: &Global, wanted: &str, limit: Duration) -> Result<String> {
    let found = find(global, wanted).await?;
    if found.is_ready() {
        let task = found.task().await?;
        let record = found.pod.record.as_ref();
        let signal = record.map_or(Signal::SIGTERM as i32, |r| r.stop_signal);
        for container in found.container_ids() {
            end_container(&task, container, signal, limit).await?;
        }
    }
    if let Some(controller) = &found.pod.controller {
        controller.stop(&found.pod.id).await?;
    }
    Ok(found.pod.id)
}

/// `signal`, and KILL when that takes longer than `limit`.
async fn end_container(task: &Task, container: String, signal: i32, limit: Duration) -> Result<()> {
    let name = ProcessName {
        container,
        exec: String::new(),
    };
    task.kill(&name, signal, false).await?;
    if let Ok(ended) = tokio::time::timeout(limit, task.wait(&name)).await {
        return ended.map(drop);
    }
    task.kill(&name, Signal::SIGKILL as i32, true).await?;
    task.wait(&name).await.map(drop)
}

async fn remove_one(global: &Global, wanted: &str, force: bool) -> Result<String> {
    let found = find(global, wanted).await?;
    if !force && runs(&found).await {
        let title = found.pod.title();
        return Err(CliError::new(format!("pod {title} runs"))
            .next(format!("`kuasar-ctl stop {title}` first, or `rm --force`")));
    }
    if let Some(controller) = &found.pod.controller {
        // Shutdown frees what a failed stop leaves.
        let stopped = controller.stop(&found.pod.id).await;
        controller.shutdown(&found.pod.id).await.and(stopped)?;
    }
    if let Some(record) = &found.pod.record {
        drop(PodStore::open().reopen(record));
    }
    Ok(found.pod.id)
}

/// Whether anything in the pod would be killed by its removal.
async fn runs(found: &Found) -> bool {
    let ended = |state: &str| matches!(state, "stopped" | "unknown");
    found.is_ready() && found.containers().await.iter().any(|c| !ended(&c.state))
}
