//! Templates: pods start as copy-on-write clones of a guest that has booted once.
//!
//! A template is a machine that was saved when its agent was about to connect to the host
//! ([`build`]); no pod has ever used it, and no connection is open in it. [`key`] says what
//! it was made of; with any other kernel, initramfs, size, CPU or release it is not used.
//! [`store`] keeps templates on disk for the next daemon, [`manager`] in memory for this
//! one, built when they are first needed. [`warm`] has clones of it ahead of their pods.

mod build;
mod key;
mod manager;
mod store;
mod warm;

pub use build::{BuildTemplateError, TemplateMachine};
pub use key::{TemplateKey, TemplateParts};
pub use manager::TemplateManager;
pub use store::{StoreError, Stored, TemplateInfo, TemplateStore};
pub use warm::{MakeWarm, WarmClone, WarmError, WarmPool, nowhere};
