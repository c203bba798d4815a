//! What can go wrong with a request, and the ttrpc code the host sees.

use std::io;

use ttrpc::proto::Code;

/// Why a request was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// An id that could not name a file.
    #[error("{field} {value:?} is not a valid id: use 1 to 256 of A-Z a-z 0-9 _ - . +")]
    InvalidId {
        /// Field of the request.
        field: &'static str,
        /// What was given.
        value: String,
    },
    /// A field whose value cannot be used.
    #[error("{field}: {why}")]
    Invalid {
        /// Field of the request or of the OCI spec.
        field: String,
        /// What is wrong, with the value.
        why: String,
    },
    /// No such container.
    #[error("container {0} does not exist")]
    NoContainer(String),
    /// No such exec.
    #[error("container {0} has no exec {1}")]
    NoExec(String, String),
    /// The process has ended already.
    #[error("process {0} has exited")]
    Exited(String),
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The object is not in a state that allows the request.
    #[error("{what} is {is}, needs to be {needs}")]
    State {
        /// Container or process.
        what: String,
        /// Its state.
        is: &'static str,
        /// The state the request needs.
        needs: &'static str,
    },
    /// The program to execute does not exist.
    #[error("{0:?}: executable not found")]
    CommandNotFound(String),
    /// The program exists but cannot be executed.
    #[error("{0:?}: cannot be executed: {1}")]
    NotExecutable(String, io::Error),
    /// Nothing happened in time.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The container runtime failed.
    #[error("container runtime: {0}")]
    Runtime(String),
    /// A fault of the agent itself.
    #[error("internal error: {0}")]
    Internal(String),
}

impl AgentError {
    /// An invalid field.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "takes errors and strings alike"
    )]
    pub fn invalid(field: impl Into<String>, why: impl ToString) -> Self {
        Self::Invalid {
            field: field.into(),
            why: why.to_string(),
        }
    }

    /// Adds to a system error what was attempted.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The ttrpc code of this error.
    pub const fn code(&self) -> Code {
        match self {
            Self::InvalidId { .. } | Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::NoContainer(_)
            | Self::NoExec(..)
            | Self::Exited(_)
            | Self::CommandNotFound(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::NotExecutable(..) => Code::PERMISSION_DENIED,
            Self::Deadline(_) => Code::DEADLINE_EXCEEDED,
            Self::Io { .. } | Self::Runtime(_) | Self::Internal(_) => Code::INTERNAL,
        }
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(e: AgentError) -> Self {
        Self::RpcStatus(ttrpc::get_status(e.code(), e))
    }
}

/// Checks an id of a request.
pub fn check_id(field: &'static str, id: &str) -> Result<(), AgentError> {
    if agent_api::stream::valid_id(id) {
        return Ok(());
    }
    Err(AgentError::InvalidId {
        field,
        value: id.chars().take(64).collect(),
    })
}
