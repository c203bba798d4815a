//! Programs: modules and components, checked, compiled and linked.

mod cache;
mod find;
mod format;
mod loaded;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use wasmtime::component::{Component, InstancePre as ComponentPre};
use wasmtime::{InstancePre, Module, ResourcesRequired};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

pub(crate) use cache::DiskCache;
pub use find::Root;
pub(crate) use loaded::Loaded;

use crate::container::State;
use crate::error::{Result, WasmError, causes};
use crate::host::{Host, Inner};
use format::Format;

/// Digest of a program's bytes.
pub(crate) type Digest = blake3::Hash;

/// What a program offers to run.
pub(crate) enum Entry {
    /// A core module's `_start`.
    Module(InstancePre<State>),
    /// A component's `wasi:cli/run`.
    Command(CommandPre<State>),
    /// A component's `wasi:http/incoming-handler`.
    Proxy(ProxyPre<State>),
}

/// A program that is ready to be started any number of times.
pub struct Program {
    name: String,
    digest: Digest,
    pub(crate) entry: Entry,
    /// Linear memory that one instance starts with, in bytes.
    initial_memory: u64,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program")
            .field("name", &self.name)
            .field("kind", &self.kind())
            .field("digest", &self.digest.to_hex().as_str())
            .finish_non_exhaustive()
    }
}

impl Program {
    /// `module`, `component` or `http-proxy`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.entry {
            Entry::Module(_) => "module",
            Entry::Command(_) => "component",
            Entry::Proxy(_) => "http-proxy",
        }
    }

    /// Whether it serves HTTP requests instead of running to an end.
    #[must_use]
    pub fn is_proxy(&self) -> bool {
        matches!(self.entry, Entry::Proxy(_))
    }

    /// Checks a memory limit, in bytes, against what the program starts with.
    ///
    /// # Errors
    /// The limit is lower.
    pub fn check_memory(&self, limit: Option<u64>) -> Result<()> {
        match limit {
            Some(limit) if limit < self.initial_memory => Err(WasmError::MemoryLimit {
                name: self.name.clone(),
                needed: self.initial_memory,
                limit,
            }),
            _ => Ok(()),
        }
    }
}

impl Host {
    /// Loads the program in the file at `path`; see [`Host::load_file`].
    ///
    /// # Errors
    /// As for [`Host::load_file`]; the file cannot be opened.
    pub async fn load(&self, path: &Path) -> Result<Arc<Program>> {
        let name = path.display().to_string();
        let opened = path.to_owned();
        let file = blocking(&name, move || {
            File::open(&opened).map_err(WasmError::io(format!("opening {}", opened.display())))
        })
        .await?;
        self.load_file(&name, file).await
    }

    /// Loads a program: a module or a component, binary or text. It is compiled the first
    /// time, off the async threads and once however many ask for it; `name` is for messages.
    ///
    /// # Errors
    /// It is no such file, invalid, too large, imports what is not provided, or has nothing
    /// to run.
    pub async fn load_file(&self, name: &str, file: File) -> Result<Arc<Program>> {
        let inner = Arc::clone(&self.inner);
        let (label, limit) = (name.to_owned(), self.inner.config.max_program_bytes);
        let known = Arc::clone(&inner);
        let source = blocking(name, move || read(&known, &label, file, limit)).await?;
        match source {
            Source::Known(program) => Ok(program),
            Source::Read { bytes, digest, id } => {
                let program = inner.load(name, digest, bytes).await?;
                if let Some(id) = id {
                    inner.loaded.remember(id, &program);
                }
                Ok(program)
            }
        }
    }

    /// Loads a program from memory; see [`Host::load_file`].
    ///
    /// # Errors
    /// As for [`Host::load_file`].
    pub async fn load_bytes(&self, name: &str, bytes: &[u8]) -> Result<Arc<Program>> {
        let len = bytes.len() as u64;
        check_size(name, len, self.inner.config.max_program_bytes)?;
        let digest = blake3::hash(bytes);
        self.inner.load(name, digest, bytes.to_vec()).await
    }
}

/// What reading a file gave.
enum Source {
    Known(Arc<Program>),
    Read {
        bytes: Vec<u8>,
        digest: Digest,
        id: Option<loaded::FileId>,
    },
}

fn read(inner: &Inner, name: &str, mut file: File, limit: u64) -> Result<Source> {
    let reading = || format!("reading {name}");
    let meta = file.metadata().map_err(WasmError::io(reading()))?;
    if !meta.is_file() {
        return Err(WasmError::NotWasm {
            name: name.to_owned(),
            found: "no regular file",
            fix: "name a .wasm file",
        });
    }
    check_size(name, meta.len(), limit)?;
    let id = loaded::FileId::of(&meta);
    if let Some(program) = inner.loaded.by_file(&id) {
        return Ok(Source::Known(program));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or_default());
    // A file that grows meanwhile is cut off, and then refused.
    let most = limit.saturating_add(1);
    std::io::Read::by_ref(&mut file)
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(WasmError::io(reading()))?;
    check_size(name, bytes.len() as u64, limit)?;
    // One that was written to meanwhile is not known by what it was before.
    let unchanged = file
        .metadata()
        .is_ok_and(|now| loaded::FileId::of(&now) == id);
    Ok(Source::Read {
        digest: blake3::hash(&bytes),
        bytes,
        id: (unchanged && loaded::is_settled(&meta)).then_some(id),
    })
}

fn check_size(name: &str, bytes: u64, limit: u64) -> Result<()> {
    if bytes <= limit {
        return Ok(());
    }
    Err(WasmError::TooLarge {
        name: name.to_owned(),
        bytes,
        limit,
    })
}

async fn blocking<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(WasmError::Internal {
            name: name.to_owned(),
            reason: e.to_string(),
        })
    })
}

impl Inner {
    async fn load(
        self: &Arc<Self>,
        name: &str,
        digest: Digest,
        bytes: Vec<u8>,
    ) -> Result<Arc<Program>> {
        let flight = self.loaded.flight(digest);
        let inner = Arc::clone(self);
        let label = name.to_owned();
        // Goes on when whoever asked first goes away: others wait for it.
        let work = tokio::spawn(async move {
            let make = async {
                if let Some(program) = inner.loaded.by_digest(&digest) {
                    return Ok(program);
                }
                let _permit = inner
                    .compiling
                    .acquire()
                    .await
                    .map_err(|e| WasmError::Internal {
                        name: label.clone(),
                        reason: e.to_string(),
                    })?;
                let (inner, name) = (Arc::clone(&inner), label.clone());
                let program =
                    blocking(&label, move || inner.prepare(&name, digest, &bytes)).await?;
                Ok(Arc::new(program))
            };
            let made = flight.get_or_try_init(|| make).await.cloned();
            if let Ok(program) = &made {
                inner.loaded.keep(program);
            }
            inner.loaded.landed(&digest);
            made
        });
        work.await.unwrap_or_else(|e| {
            Err(WasmError::Internal {
                name: name.to_owned(),
                reason: e.to_string(),
            })
        })
    }

    /// Compiles, or takes what was compiled before, and links. Blocks.
    fn prepare(&self, name: &str, digest: Digest, bytes: &[u8]) -> Result<Program> {
        let text;
        let (format, bytes) = match Format::of(name, bytes)? {
            Format::Text => {
                text = wat::parse_bytes(bytes).map_err(|e| WasmError::Text {
                    name: name.to_owned(),
                    reason: e.to_string(),
                })?;
                (Format::of(name, &text)?, text.as_ref())
            }
            format => (format, bytes),
        };
        let component = matches!(format, Format::Component);
        let invalid = |e: wasmtime::Error| WasmError::Invalid {
            name: name.to_owned(),
            reason: causes(&e),
        };
        let cached = self
            .disk
            .as_ref()
            .and_then(|disk| disk.get(&self.engine, &digest));
        let code = match cached {
            Some(code) => code,
            None => {
                let code = if component {
                    self.engine.precompile_component(bytes)
                } else {
                    self.engine.precompile_module(bytes)
                }
                .map_err(invalid)?;
                if let Some(disk) = &self.disk {
                    disk.put(&self.engine, &digest, &code);
                }
                code
            }
        };
        let (entry, required) = if component {
            // SAFETY: the engine made this code, in this process or in an earlier one whose
            // file was authenticated by a key that only this user has.
            let component =
                unsafe { Component::deserialize(&self.engine, &code) }.map_err(invalid)?;
            let required = component.resources_required();
            (self.link_component(name, &component)?, required)
        } else {
            // SAFETY: as above.
            let module = unsafe { Module::deserialize(&self.engine, &code) }.map_err(invalid)?;
            let required = Some(module.resources_required());
            (self.link_module(name, &module)?, required)
        };
        Ok(Program {
            name: name.to_owned(),
            digest,
            entry,
            initial_memory: required.as_ref().map_or(0, initial_memory),
        })
    }

    fn link_module(&self, name: &str, module: &Module) -> Result<Entry> {
        if module.get_export("_start").is_none() {
            let exports: Vec<_> = module
                .exports()
                .map(|export| export.name().to_owned())
                .collect();
            return Err(WasmError::NoEntry {
                name: name.to_owned(),
                reason: format!(
                    "it has no function `_start`, as a library or reactor has none; it exports {}",
                    list(&exports)
                ),
            });
        }
        let mut probe = wasmtime::Store::new(&self.engine, State::empty());
        let missing: Vec<_> = module
            .imports()
            .filter(|import| self.modules.get_by_import(&mut probe, import).is_none())
            .map(|import| format!("{}::{}", import.module(), import.name()))
            .collect();
        if !missing.is_empty() {
            return Err(WasmError::UnknownImports {
                name: name.to_owned(),
                imports: missing,
            });
        }
        let pre = self
            .modules
            .instantiate_pre(module)
            .map_err(|e| WasmError::Invalid {
                name: name.to_owned(),
                reason: causes(&e),
            })?;
        Ok(Entry::Module(pre))
    }

    fn link_component(&self, name: &str, component: &Component) -> Result<Entry> {
        let pre: ComponentPre<State> =
            self.components
                .instantiate_pre(component)
                .map_err(|e| WasmError::UnknownImports {
                    name: name.to_owned(),
                    imports: vec![causes(&e)],
                })?;
        if let Ok(command) = CommandPre::new(pre.clone()) {
            return Ok(Entry::Command(command));
        }
        ProxyPre::new(pre).map(Entry::Proxy).map_err(|_| {
            let ty = component.component_type();
            let exports: Vec<_> = ty
                .exports(&self.engine)
                .map(|(name, _)| name.to_owned())
                .collect();
            WasmError::NoEntry {
                name: name.to_owned(),
                reason: format!(
                    "it exports neither wasi:cli/run nor wasi:http/incoming-handler of WASI 0.2; \
                     it exports {}",
                    list(&exports)
                ),
            }
        })
    }
}

/// A page of linear memory, in bytes.
const PAGE_BYTES: u64 = 64 << 10;

fn initial_memory(required: &ResourcesRequired) -> u64 {
    let pages = required.max_initial_memory_size.unwrap_or(0);
    pages.saturating_mul(PAGE_BYTES)
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".to_owned();
    }
    names.join(", ")
}
