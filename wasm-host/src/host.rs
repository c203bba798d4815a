//! One engine for all containers of a process.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tracing::warn;
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig};
use wasmtime_wasi::I32Exit;

use crate::config::HostConfig;
use crate::container::{Budget, State};
use crate::error::{Result, WasmError, causes};
use crate::program::{DiskCache, Loaded};
use crate::ticker::Ticker;

/// Stack of a guest, in bytes: more is a stack overflow, which ends that guest.
const STACK_BYTES: usize = 512 << 10;

/// Stack that host functions have beneath it, in bytes.
const HOST_STACK_BYTES: usize = 512 << 10;

/// Most elements of a table in the pool.
const TABLE_ELEMENTS: usize = 100_000;

/// Most bytes that the engine keeps for one instance.
const INSTANCE_BYTES: usize = 4 << 20;

/// Tables, memories and core instances that one component may have.
const PER_COMPONENT: u32 = 32;

/// The engine with everything that containers share. Clones are the same host.
#[derive(Clone)]
pub struct Host {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) ticker: Ticker,
    pub(crate) engine: Engine,
    pub(crate) modules: wasmtime::Linker<State>,
    pub(crate) components: wasmtime::component::Linker<State>,
    pub(crate) config: HostConfig,
    pub(crate) budget: Arc<Budget>,
    pub(crate) disk: Option<DiskCache>,
    pub(crate) loaded: Loaded,
    /// Permits to compile.
    pub(crate) compiling: Semaphore,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl Host {
    /// Makes an engine. The first one of a process installs handlers for `SIGSEGV`, `SIGBUS`,
    /// `SIGILL` and `SIGFPE`, which pass on what does not come from a guest. Blocks.
    ///
    /// # Errors
    /// The host lacks address space, or the cache cannot be used.
    pub fn new(config: HostConfig) -> Result<Self> {
        let engine = engine(&config)?;
        let failed = |e: wasmtime::Error| WasmError::Engine(causes(&e));
        let mut modules = wasmtime::Linker::new(&engine);
        wasmtime_wasi::p1::add_to_linker_async(&mut modules, State::preview1).map_err(failed)?;
        modules.allow_shadowing(true);
        // WASI's own refuses codes above 125, which programs use nevertheless.
        modules
            .func_wrap(
                "wasi_snapshot_preview1",
                "proc_exit",
                |code: i32| -> wasmtime::Result<()> { Err(I32Exit(code).into()) },
            )
            .map_err(failed)?;
        let mut components = wasmtime::component::Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut components).map_err(failed)?;
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut components).map_err(failed)?;
        let disk = match &config.cache {
            Some(cache) => Some(DiskCache::open(cache)?),
            None => None,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                ticker: Ticker::start(&engine)?,
                engine,
                modules,
                components,
                budget: Budget::new(config.total_memory_bytes),
                disk,
                loaded: Loaded::new(config.keep_programs),
                compiling: Semaphore::new(config.compilations.max(1)),
                config,
            }),
        })
    }

    /// Linear memory of all containers now, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.inner.budget.used()
    }
}

fn engine(config: &HostConfig) -> Result<Engine> {
    let mut settings = settings();
    settings.allocation_strategy(InstanceAllocationStrategy::Pooling(pool(config)));
    let pooled = Engine::new(&settings);
    let why = match pooled {
        Ok(engine) => return Ok(engine),
        Err(e) => causes(&e),
    };
    warn!("instances are allocated one by one, which is slower: {why}");
    let mut settings = self::settings();
    settings.allocation_strategy(InstanceAllocationStrategy::OnDemand);
    Engine::new(&settings).map_err(|e| WasmError::Engine(causes(&e)))
}

fn settings() -> Config {
    let mut settings = Config::new();
    settings
        .epoch_interruption(true)
        .max_wasm_stack(STACK_BYTES)
        .async_stack_size(STACK_BYTES + HOST_STACK_BYTES)
        .memory_init_cow(true)
        .cranelift_opt_level(OptLevel::Speed);
    settings
}

fn pool(config: &HostConfig) -> PoolingAllocationConfig {
    let most = config.max_instances;
    let mut pool = PoolingAllocationConfig::new();
    pool.total_core_instances(most)
        .total_component_instances(most)
        .total_memories(most)
        .total_tables(most.saturating_mul(2))
        .total_stacks(most)
        .max_core_instance_size(INSTANCE_BYTES)
        .max_component_instance_size(INSTANCE_BYTES)
        .max_core_instances_per_component(PER_COMPONENT)
        .max_memories_per_component(PER_COMPONENT)
        .max_tables_per_component(PER_COMPONENT)
        .max_memories_per_module(PER_COMPONENT)
        .max_tables_per_module(PER_COMPONENT)
        .table_elements(TABLE_ELEMENTS)
        .max_memory_size(usize::try_from(config.max_memory_bytes).unwrap_or(usize::MAX));
    pool
}
