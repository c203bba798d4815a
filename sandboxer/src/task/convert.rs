//! Between this daemon's types and the messages of the Task API.

use containerd_shim_protos::api::{Mount, StateResponse, Status};
use protobuf::{EnumOrUnknown, MessageField};
use ttrpc::Code;

use crate::causes::with_causes;
pub(super) use crate::events::timestamp;
use crate::pod::{Container, ErrorCode, PodError, Process, ProcessState, RootfsMount};

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
