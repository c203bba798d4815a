//! What a container runtime has to do, row by row, through the Container Runtime Interface.
//!
//! `kuasar-e2e` runs the rows on a containerd and a daemon of its own, or on an installed
//! node's. `docs/conformance.md` lists them. A row passes, fails, or is skipped and says why.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a row reports by panicking"
)]

pub mod report;
mod rows;
pub mod soak;
mod suite;

pub use rows::ROWS;
pub use suite::{Backend, Mode, Setup, Snapshotter, Suite};

/// One requirement.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As the documents count it.
    pub number: u32,
    /// What is required.
    pub name: &'static str,
    /// Whether each change is checked for it.
    pub core: bool,
    /// Shows it.
    pub run: fn(&Suite) -> Outcome,
}

/// A row that was gone through, or why it cannot be here. A row that fails panics.
pub type Outcome = Result<(), Skipped>;

/// Why a row cannot be gone through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped(pub String);

/// Leaves a row.
///
/// # Errors
/// Always.
pub fn skip(why: impl Into<String>) -> Outcome {
    Err(Skipped(why.into()))
}

/// How a row went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not, and what was seen.
    Fail(String),
    /// It cannot be told here, and why.
    Skip(String),
}
