//! What can go wrong with a pod, as the caller of an RPC has to see it.

use crate::agent::AgentError;
use vmm_core::vm::VmError;

/// Failure of an operation on a pod or one of its containers.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// A field of the request cannot be used.
    #[error("{field} = {value:?}: {fix}")]
    Invalid {
        /// The field as the API names it.
        field: &'static str,
        /// What the request holds.
        value: String,
        /// What it must be.
        fix: String,
    },
    /// No such pod, container, process or file.
    #[error("{what} {id} not found")]
    NotFound {
        /// `sandbox`, `container`, `exec`, ...
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The id is taken.
    #[error("{what} {id} already exists")]
    Exists {
        /// `sandbox`, `container` or `exec`.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// Not possible in the present state.
    #[error("cannot {action} {what} {id}: it is {state}")]
    State {
        /// The operation, as a verb.
        action: &'static str,
        /// `sandbox`, `container` or `exec`.
        what: &'static str,
        /// Its id.
        id: String,
        /// The state it is in.
        state: String,
    },
    /// This daemon has no such feature.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// The operation was given up because the pod is being stopped or the caller is gone.
    #[error("{0} was cancelled")]
    Cancelled(&'static str),
    /// The guest's agent refused or did not answer.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine failed.
    #[error("sandbox {pod}: {source}")]
    Vm {
        /// The pod.
        pod: String,
        /// Why.
        source: VmError,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Result of an operation on a pod.
pub type Result<T> = std::result::Result<T, PodError>;

impl PodError {
    /// Names what was tried when a system call fails.
    pub(crate) fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

    /// An unusable field of a request.
    pub(crate) fn invalid(
        field: &'static str,
        value: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            value: value.into(),
            fix: fix.into(),
        }
    }

    /// Nothing of that name.
    pub(crate) fn not_found(what: &'static str, id: impl Into<String>) -> Self {
        Self::NotFound {
            what,
            id: id.into(),
        }
    }

    /// The kind of failure in the terms gRPC and ttrpc share.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid { .. } => ErrorCode::InvalidArgument,
            Self::NotFound { .. } => ErrorCode::NotFound,
            Self::Exists { .. } => ErrorCode::AlreadyExists,
            Self::State { .. } => ErrorCode::FailedPrecondition,
            Self::Unsupported(_) => ErrorCode::Unimplemented,
            Self::Cancelled(_) => ErrorCode::Cancelled,
            Self::Agent(e) => e.code(),
            Self::Vm { source, .. } => match source {
                VmError::Unsupported { .. } => ErrorCode::Unimplemented,
                VmError::Deadline { .. } => ErrorCode::DeadlineExceeded,
                VmError::Exited(_) => ErrorCode::FailedPrecondition,
                _ => ErrorCode::Internal,
            },
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => ErrorCode::NotFound,
                std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::Internal,
            },
        }
    }
}

/// Status codes that gRPC and ttrpc share, numbered as both number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The operation was given up.
    Cancelled = 1,
    /// Anything the agent did not classify.
    Unknown = 2,
    /// A field of the request is wrong.
    InvalidArgument = 3,
    /// A deadline passed.
    DeadlineExceeded = 4,
    /// No such thing.
    NotFound = 5,
    /// The id is taken.
    AlreadyExists = 6,
    /// The host or guest refused.
    PermissionDenied = 7,
    /// Not in this state.
    FailedPrecondition = 9,
    /// No such feature.
    Unimplemented = 12,
    /// A failure of this daemon or its host.
    Internal = 13,
    /// The other side is gone.
    Unavailable = 14,
}
