//! What can go wrong, in words for the person who gave us the module.

use std::path::PathBuf;

/// Why a program cannot be loaded or a container not be made.
#[derive(Debug, thiserror::Error)]
pub enum WasmError {
    /// The engine cannot be made on this host.
    #[error("the WebAssembly engine cannot start: {0}")]
    Engine(String),
    /// There is no such file in the container.
    #[error("{path}: no such file in the container's root file system")]
    NotFound {
        /// The path as the container names it.
        path: String,
    },
    /// The file is something else.
    #[error("{name} is {found}, not a WebAssembly module or component: {fix}")]
    NotWasm {
        /// The program.
        name: String,
        /// What it is.
        found: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// The file is larger than the host accepts.
    #[error(
        "{name} has {bytes} bytes, more than the limit of {limit}: raise the limit or strip it"
    )]
    TooLarge {
        /// The program.
        name: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The text format does not parse.
    #[error("{name} is no valid WebAssembly text: {reason}")]
    Text {
        /// The program.
        name: String,
        /// Where and why.
        reason: String,
    },
    /// Truncated, malformed, or of a proposal that is not enabled.
    #[error("{name} is no valid WebAssembly: {reason}")]
    Invalid {
        /// The program.
        name: String,
        /// Where and why.
        reason: String,
    },
    /// It wants functions that nobody provides.
    #[error(
        "{name} imports what this host does not provide: {}; WASI preview 1 and WASI 0.2 \
         (cli, clocks, filesystem, http, io, random, sockets) are provided",
        .imports.join(", ")
    )]
    UnknownImports {
        /// The program.
        name: String,
        /// `module::name` of each.
        imports: Vec<String>,
    },
    /// It cannot be run as a program.
    #[error("{name} cannot be started: {reason}")]
    NoEntry {
        /// The program.
        name: String,
        /// What is missing.
        reason: String,
    },
    /// The limit of the container is below what the program starts with.
    #[error(
        "{name} starts with {needed} bytes of linear memory, the container's memory limit is \
         {limit}: raise the limit"
    )]
    MemoryLimit {
        /// The program.
        name: String,
        /// What it declares.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// A mount cannot be opened.
    #[error("cannot open {path} for the container's {guest}: {source}")]
    Mount {
        /// On the host.
        path: PathBuf,
        /// In the container.
        guest: String,
        /// Why.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Failure of the engine.
    #[error("{name}: {reason}")]
    Internal {
        /// The program.
        name: String,
        /// Why.
        reason: String,
    },
}

impl WasmError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, WasmError>;

/// An engine's error with its causes in one line.
pub(crate) fn causes(error: &wasmtime::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}
