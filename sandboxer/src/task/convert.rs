//! Between this daemon's types and the messages of the Task API.

use agent_api::rpc;
use containerd_shim_protos::api::{Mount, StateResponse, Status};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, Message, MessageField};
use ttrpc::Code;

use crate::causes::with_causes;
pub(super) use crate::events::timestamp;
use crate::pod::{Container, ErrorCode, PodError, Process, ProcessState, RootfsMount};

/// `type_url` of cgroup v2 figures, bare as containerd registers it.
const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

// Taken by value to be the argument of `map_err`.
#[allow(clippy::needless_pass_by_value)]
pub(super) fn into_ttrpc(error: PodError) -> ttrpc::Error {
    let code = match error.code() {
        ErrorCode::Cancelled => Code::ABORTED,
        ErrorCode::Unknown => Code::UNKNOWN,
        ErrorCode::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorCode::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorCode::NotFound => Code::NOT_FOUND,
        ErrorCode::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorCode::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorCode::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorCode::Unimplemented => Code::UNIMPLEMENTED,
        ErrorCode::Internal => Code::INTERNAL,
        ErrorCode::Unavailable => Code::UNAVAILABLE,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, with_causes(&error)))
}

pub(super) fn mount(mount: Mount) -> RootfsMount {
    RootfsMount {
        fstype: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

pub(super) fn state(container: &Container, process: &Process) -> StateResponse {
    let paths = process.stdio_paths();
    let mut response = StateResponse {
        id: container.id().to_owned(),
        exec_id: process.id().exec_id.clone(),
        bundle: container.bundle().to_string_lossy().into_owned(),
        pid: process.pid(),
        stdin: paths.stdin.clone(),
        stdout: paths.stdout.clone(),
        stderr: paths.stderr.clone(),
        terminal: paths.terminal,
        ..Default::default()
    };
    let status = match process.state() {
        ProcessState::Creating | ProcessState::Created | ProcessState::Starting => Status::CREATED,
        ProcessState::Running if container.is_paused() => Status::PAUSED,
        ProcessState::Running => Status::RUNNING,
        ProcessState::Exited(exit) => {
            response.exit_status = exit.code;
            response.exited_at = MessageField::some(timestamp(exit.at));
            Status::STOPPED
        }
    };
    response.status = EnumOrUnknown::new(status);
    response
}

pub(super) fn metrics(stats: &rpc::StatsResponse) -> ttrpc::Result<Any> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: stats.memory_anon_bytes,
            file: stats.memory_file_bytes,
            inactive_file: stats.memory_inactive_file_bytes,
            usage: stats.memory_usage_bytes,
            usage_limit: stats.memory_limit_bytes,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            oom_kill: stats.memory_oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    };
    let value = metrics
        .write_to_bytes()
        .map_err(|e| ttrpc::Error::Others(e.to_string()))?;
    Ok(Any {
        type_url: METRICS_TYPE.to_owned(),
        value,
        ..Default::default()
    })
}
