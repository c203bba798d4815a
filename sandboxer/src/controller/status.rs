//! What the Controller says about a pod.

use std::time::SystemTime;

use serde_json::json;

use super::{TASK_API_VERSION, is_ready};
use crate::pod::{Phase, Pod};
use crate::rpc::controller::ControllerStatusResponse;
use crate::rpc::types::Metric;

/// `type_url` of a pod's metrics, JSON.
const METRICS_TYPE: &str = "kuasar.io/vm.Stats";

/// Where the Task API of a pod is served, as containerd's dialler wants it.
pub(super) fn address(pod: &Pod) -> String {
    format!("ttrpc+unix://{}", pod.task_socket().display())
}

/// This host's architecture as Go names it.
pub(super) const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

pub(super) fn status(pod: &Pod, verbose: bool) -> ControllerStatusResponse {
    let phase = pod.phase();
    let ready = is_ready(&phase);
    let state = if ready {
        "SANDBOX_READY"
    } else {
        "SANDBOX_NOTREADY"
    };
    let exited_at = match &phase {
        Phase::NotReady { exit, .. } => Some(exit.at.into()),
        _ => None,
    };
    let mut response = ControllerStatusResponse {
        sandbox_id: pod.id().to_owned(),
        pid: pod.pid(),
        state: state.to_owned(),
        created_at: Some(pod.created_at().into()),
        exited_at,
        ..Default::default()
    };
    if ready {
        response.address = address(pod);
        response.version = TASK_API_VERSION;
    }
    if verbose {
        response.info.insert("info".to_owned(), info(pod, &phase));
    }
    response
}

/// JSON for `crictl inspectp` and `kuasar-ctl inspect`.
fn info(pod: &Pod, phase: &Phase) -> String {
    let request = pod.request();
    let reason = match phase {
        Phase::NotReady { reason, .. } => reason.as_str(),
        _ => "",
    };
    json!({
        "pid": pod.pid(),
        "processStatus": phase.name(),
        "reason": reason,
        "netNamespaceClosed": false,
        "netns": request.netns,
        "hostname": request.hostname(),
        "backend": pod.backend(),
        "dir": pod.dir(),
        "containers": pod.container_ids(),
        "labels": request.config.labels,
        "annotations": request.config.annotations,
        "guest": guest(pod),
        "vm": vm(pod),
    })
    .to_string()
}

fn guest(pod: &Pod) -> serde_json::Value {
    pod.guest().map_or(serde_json::Value::Null, |guest| {
        json!({
            "kernel": guest.kernel_release,
            "agent": guest.agent_version,
            "cpus": guest.cpus,
            "memory_bytes": guest.memory_bytes,
            "init_at_us": guest.init_at_us,
            "ready_at_us": guest.ready_at_us,
        })
    })
}

fn vm(pod: &Pod) -> serde_json::Value {
    let Some(stats) = pod.vm_stats() else {
        return serde_json::Value::Null;
    };
    let phases: Vec<_> = stats
        .phases
        .iter()
        .map(|phase| {
            json!({
                "name": phase.name,
                "us": phase.since.as_micros(),
                "exits": phase.exits,
            })
        })
        .collect();
    json!({
        "memory_bytes": stats.memory_bytes,
        "resident_bytes": stats.resident_bytes,
        "exits": stats.exits,
        "phases": phases,
    })
}

pub(super) fn metrics(pod: &Pod) -> Metric {
    Metric {
        timestamp: Some(SystemTime::now().into()),
        id: pod.id().to_owned(),
        data: Some(prost_types::Any {
            type_url: METRICS_TYPE.to_owned(),
            value: vm(pod).to_string().into_bytes(),
        }),
    }
}
