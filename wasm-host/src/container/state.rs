//! What the engine keeps for one guest.

use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use super::control::Handles;
use super::http::Outgoing;
use super::memory::Limiter;
use crate::config::{Mount, Network, Settings};
use crate::error::{Result, WasmError};
use crate::stdio::{Input, Output};

/// See the module.
pub(crate) struct State {
    wasi: WasiP1Ctx,
    http: WasiHttpCtx,
    outgoing: Outgoing,
    pub(super) limiter: Limiter,
    handles: Option<Handles>,
}

/// The streams of a guest, as all its handles share them.
#[derive(Clone)]
pub(crate) struct Outputs {
    pub(super) stdout: Output,
    pub(super) stderr: Output,
}

impl State {
    /// A guest with what `settings` grant. Blocks on opening folders.
    pub(super) fn new(
        settings: &Settings,
        stdin: Option<Input>,
        outputs: &Outputs,
        limiter: Limiter,
        handles: Handles,
    ) -> Result<Self> {
        let mut builder = WasiCtx::builder();
        builder
            .args(&settings.args)
            .envs(&settings.env)
            .stdout(outputs.stdout.clone())
            .stderr(outputs.stderr.clone());
        if let Some(stdin) = stdin {
            builder.stdin(stdin);
        }
        if let Some(cwd) = &settings.cwd {
            builder.initial_cwd(cwd);
        }
        for mount in &settings.mounts {
            preopen(&mut builder, mount)?;
        }
        let networked = settings.network == Network::Namespace;
        if networked {
            builder
                .allow_tcp(true)
                .allow_udp(true)
                .allow_ip_name_lookup(true)
                .inherit_network();
        }
        let mut wasi = builder.build_p1();
        wasi.ctx().table.set_max_capacity(settings.limits.handles);
        Ok(Self {
            wasi,
            http: WasiHttpCtx::new(),
            outgoing: Outgoing { allowed: networked },
            limiter,
            handles: Some(handles),
        })
    }

    /// Grants nothing: for looking things up.
    pub(crate) fn empty() -> Self {
        Self {
            wasi: WasiCtxBuilder::new().build_p1(),
            http: WasiHttpCtx::new(),
            outgoing: Outgoing { allowed: false },
            limiter: Limiter::closed(),
            handles: None,
        }
    }

    pub(crate) fn preview1(&mut self) -> &mut WasiP1Ctx {
        self.count();
        &mut self.wasi
    }

    /// Counts the handles. Each host call passes here, so a guest that waits in one was counted
    /// with all that it had before.
    fn count(&mut self) {
        if let Some(handles) = &mut self.handles
            && handles.is_due()
        {
            handles.set(self.wasi.ctx().table.iter_mut().count() as u64);
        }
    }
}

fn preopen(builder: &mut WasiCtxBuilder, mount: &Mount) -> Result<()> {
    let perms = if mount.read_only {
        FsPerms::ReadOnly
    } else {
        FsPerms::ReadWrite
    };
    match builder.preopened_dir(&mount.host, &mount.guest, perms) {
        Ok(_) => Ok(()),
        Err(e) => Err(WasmError::Mount {
            path: mount.host.clone(),
            guest: mount.guest.clone(),
            source: match e.downcast::<std::io::Error>() {
                Ok(source) => source,
                Err(other) => std::io::Error::other(other.to_string()),
            },
        }),
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.count();
        self.wasi.ctx()
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            hooks: &mut self.outgoing,
            table: self.wasi.ctx().table,
            ctx: &mut self.http,
        }
    }
}
