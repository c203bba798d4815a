//! `kuasar-ctl ps` and `inspect`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::args::{Global, InspectArgs, PsArgs};
use super::error::{Doing, Result};
use super::output::{self, age, table};
use super::pods::{ContainerView, Found, all, find};

/// A pod as `ps --json` shows it.
#[derive(Debug, Serialize)]
struct PodView {
    id: String,
    name: Option<String>,
    state: String,
    /// ready, starting, ended, gone, ...
    phase: String,
    reason: Option<String>,
    image: Option<String>,
    command: Vec<String>,
    created_at_ns: Option<u64>,
    vcpus: Option<u64>,
    memory_bytes: Option<u64>,
    containers: Vec<ContainerView>,
}

pub(super) async fn ps(global: &Global, args: &PsArgs) -> Result<()> {
    let mut views = Vec::new();
    for pod in all(global).await? {
        views.push(view(&Found::load(pod).await?).await);
    }
    if args.json {
        return output::json(&views);
    }
    if args.quiet {
        return views.iter().try_for_each(|v| output::line(&v.id));
    }
    let rows: Vec<[String; 8]> = views.iter().flat_map(rows).collect();
    let head = [
        "POD",
        "NAME",
        "POD STATE",
        "CONTAINER",
        "IMAGE",
        "AGE",
        "VCPUS",
        "MEMORY",
    ];
    table(head, &rows)
}

pub(super) async fn inspect(global: &Global, args: &InspectArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let everything = json!({
        "pod": view(&found).await,
        "status": found.info(),
        "record": found.pod.record,
    });
    if args.json {
        return output::json(&everything);
    }
    let text = serde_json::to_string_pretty(&everything).doing(|| "write JSON".to_owned())?;
    output::line(&text)
}

async fn view(found: &Found) -> PodView {
    let record = found.pod.record.as_ref();
    let number = |part: &str, key: &str| {
        let part = found.info().get(part)?;
        part.get(key).and_then(Value::as_u64)
    };
    let created = found.created_at().and_then(|at| {
        let since = at.duration_since(UNIX_EPOCH).ok()?;
        u64::try_from(since.as_nanos()).ok()
    });
    PodView {
        id: found.pod.id.clone(),
        name: record.and_then(|r| r.name.clone()),
        state: found.state().to_owned(),
        phase: found.phase().to_owned(),
        reason: found.reason().map(str::to_owned),
        image: record.map(|r| r.image.clone()),
        command: record.map(|r| r.command.clone()).unwrap_or_default(),
        created_at_ns: created.or_else(|| record.map(|r| r.created_at_ns)),
        vcpus: number("guest", "cpus"),
        memory_bytes: number("vm", "memory_bytes"),
        containers: found.containers().await,
    }
}

/// One row per container, or one for a pod without any.
fn rows(pod: &PodView) -> Vec<[String; 8]> {
    let dash = || "-".to_owned();
    let state = &pod.phase;
    let age = pod.created_at_ns.map(|ns| {
        let at = UNIX_EPOCH
            .checked_add(Duration::from_nanos(ns))
            .unwrap_or(UNIX_EPOCH);
        age(SystemTime::now().duration_since(at).unwrap_or_default())
    });
    let row = |container: String| {
        [
            pod.id.clone(),
            pod.name.clone().unwrap_or_else(dash),
            state.clone(),
            container,
            pod.image.clone().unwrap_or_else(dash),
            age.clone().unwrap_or_else(dash),
            pod.vcpus.map_or_else(dash, |n| n.to_string()),
            pod.memory_bytes.map_or_else(dash, output::size),
        ]
    };
    if pod.containers.is_empty() {
        return vec![row(dash())];
    }
    let several = pod.containers.len() > 1;
    pod.containers
        .iter()
        .map(|c| {
            let state = match c.exit_code {
                Some(code) => format!("{} ({code})", c.state),
                None => c.state.clone(),
            };
            row(if several {
                format!("{} {state}", c.id)
            } else {
                state
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(containers: &[(&str, &str, Option<u32>)]) -> PodView {
        PodView {
            id: "abc".to_owned(),
            name: None,
            state: "SANDBOX_READY".to_owned(),
            phase: "ready".to_owned(),
            reason: None,
            image: Some("i.tar".to_owned()),
            command: Vec::new(),
            created_at_ns: None,
            vcpus: Some(2),
            memory_bytes: Some(128 << 20),
            containers: containers
                .iter()
                .map(|(id, state, exit_code)| ContainerView {
                    id: (*id).to_owned(),
                    state: (*state).to_owned(),
                    exit_code: *exit_code,
                    pid: 1,
                    bundle: String::new(),
                })
                .collect(),
        }
    }

    #[test]
    fn a_pod_has_a_row_per_container() {
        let none = rows(&pod(&[]));
        assert_eq!(
            none[0],
            ["abc", "-", "ready", "-", "i.tar", "-", "2", "128.0 MiB"]
        );
        let one = rows(&pod(&[("c", "stopped", Some(3))]));
        assert_eq!(one[0][3], "stopped (3)");
        let two = rows(&pod(&[("c", "running", None), ("d", "paused", None)]));
        assert_eq!(
            (two[0][3].as_str(), two[1][3].as_str()),
            ("c running", "d paused")
        );
    }
}
