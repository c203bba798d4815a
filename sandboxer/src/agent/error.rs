//! How a call to the agent fails.

use std::time::Duration;

use ttrpc::Code;

use crate::pod::ErrorCode;

/// Failure of a call to the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error.
    #[error("{call}: {message}")]
    Refused {
        /// Name of the call.
        call: &'static str,
        /// What kind of error.
        code: ErrorCode,
        /// The agent's message.
        message: String,
    },
    /// No answer in time.
    #[error("{call}: no answer from the guest within {limit:?}")]
    Deadline {
        /// Name of the call.
        call: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The connection broke, usually because the VM ended.
    #[error("{call}: the connection to the guest's agent is lost: {reason}")]
    Disconnected {
        /// Name of the call.
        call: &'static str,
        /// Why.
        reason: String,
    },
    /// The guest image was built from another tree.
    #[error(
        "the guest's agent speaks version {found} of the contract, this daemon {expected}: \
         rebuild the guest image (`kuasar-ctl guest build`)"
    )]
    Version {
        /// The agent's version.
        found: u32,
        /// Ours.
        expected: u32,
    },
}

impl AgentError {
    /// The kind of failure.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Deadline { .. } => ErrorCode::DeadlineExceeded,
            Self::Disconnected { .. } => ErrorCode::Unavailable,
            Self::Version { .. } => ErrorCode::FailedPrecondition,
        }
    }

    /// Translates what ttrpc reports.
    pub(crate) fn from_ttrpc(call: &'static str, limit: Duration, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => match status.code() {
                Code::DEADLINE_EXCEEDED => Self::Deadline { call, limit },
                code => Self::Refused {
                    call,
                    code: from_ttrpc_code(code),
                    message: status.message().to_owned(),
                },
            },
            other => Self::Disconnected {
                call,
                reason: other.to_string(),
            },
        }
    }
}

fn from_ttrpc_code(code: Code) -> ErrorCode {
    match code {
        Code::CANCELLED => ErrorCode::Cancelled,
        Code::INVALID_ARGUMENT => ErrorCode::InvalidArgument,
        Code::NOT_FOUND => ErrorCode::NotFound,
        Code::ALREADY_EXISTS => ErrorCode::AlreadyExists,
        Code::PERMISSION_DENIED => ErrorCode::PermissionDenied,
        Code::FAILED_PRECONDITION => ErrorCode::FailedPrecondition,
        Code::UNIMPLEMENTED => ErrorCode::Unimplemented,
        Code::INTERNAL => ErrorCode::Internal,
        Code::UNAVAILABLE => ErrorCode::Unavailable,
        _ => ErrorCode::Unknown,
    }
}
