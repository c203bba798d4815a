//! `kuasar-ctl template`: the guests that pods are cloned from.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use serde::Serialize;

use super::args::{TemplateArgs, TemplateCommand};
use super::error::{CliError, Result, chain};
use super::output::{self, BAD, GOOD, Steps, age, size, table};
use crate::backend::vmm::VmmBackend;
use crate::config::{Config, TemplateMode};
use crate::template::{Stored, TemplateInfo, TemplateKey, TemplateStore};

/// A template as `ls --json` shows it.
#[derive(Debug, Serialize)]
struct View {
    key: String,
    vcpus: Option<u32>,
    memory_bytes: Option<u64>,
    disk_bytes: u64,
    built_at: Option<u64>,
    build_ms: Option<u64>,
    kernel: Option<std::path::PathBuf>,
    used_at: u64,
}

/// What `verify` found.
#[derive(Debug, Serialize)]
struct Verified {
    key: String,
    ok: bool,
    error: Option<String>,
}

pub(super) async fn template(args: &TemplateArgs, verbose: bool) -> Result<u8> {
    let config = Config::load(args.config.as_deref()).map_err(|e| CliError::new(chain(&e)))?;
    match &args.command {
        TemplateCommand::Build { cpus, memory, json } => {
            build(config, *cpus, *memory, *json, verbose).await?;
        }
        TemplateCommand::Ls { json } => ls(&store(&config)?, *json)?,
        TemplateCommand::Rm { keys, all } => rm(&store(&config)?, keys, *all)?,
        TemplateCommand::Verify { keys, json } => {
            return verify(&store(&config)?, keys, *json).map(u8::from);
        }
    }
    Ok(0)
}

fn store(config: &Config) -> Result<TemplateStore> {
    let folder = config
        .templates
        .folder()
        .map_err(|e| CliError::new(chain(&e)))?;
    open(&folder)
}

fn open(folder: &Path) -> Result<TemplateStore> {
    TemplateStore::open(folder).map_err(|e| CliError::new(chain(&e)))
}

async fn build(
    mut config: Config,
    cpus: Option<u32>,
    memory: Option<ByteSize>,
    json: bool,
    verbose: bool,
) -> Result<()> {
    // Asked for, whatever pods do.
    config.templates.mode = TemplateMode::Auto;
    config.templates.warm = 0;
    config.templates.shells = 0;
    let vcpus = cpus.unwrap_or(config.vm.vcpus);
    let memory_bytes = memory.unwrap_or(config.vm.memory).as_u64();
    let store = store(&config)?;
    let steps = Steps::new(verbose);
    let backend = VmmBackend::new(&config).await.map_err(|e| {
        CliError::new(chain(&e)).next("`kuasar-ctl check` says what this host lacks")
    })?;
    let key = backend
        .template_key(vcpus, memory_bytes)
        .ok_or_else(|| CliError::new("templates cannot be kept; --verbose says why"))?;
    steps.step("booting a guest, or loading the template if there is one");
    let began = Instant::now();
    backend
        .template(vcpus, memory_bytes)
        .await
        .map_err(CliError::new)?;
    let took = began.elapsed();
    steps.done();
    let stored = list(&store)?
        .into_iter()
        .find(|stored| stored.key == key)
        .ok_or_else(|| CliError::new("the template was built and could not be kept"))?;
    if json {
        return output::json(&view(&stored));
    }
    output::line(&format!(
        "{GOOD}ready{GOOD:#} {key}  {}  {} on disk  {:.1} s",
        size_of_machine(stored.info.as_ref()),
        size(stored.disk_bytes),
        took.as_secs_f64()
    ))
}

fn list(store: &TemplateStore) -> Result<Vec<Stored>> {
    store.list().map_err(|e| CliError::new(chain(&e)))
}

fn ls(store: &TemplateStore, json: bool) -> Result<()> {
    let templates = list(store)?;
    if json {
        return output::json(&templates.iter().map(view).collect::<Vec<_>>());
    }
    let rows: Vec<[String; 6]> = templates
        .iter()
        .map(|stored| {
            let info = stored.info.as_ref();
            let now = SystemTime::now();
            let built = info.map(|info| UNIX_EPOCH + Duration::from_secs(info.built_at));
            let ago = |time: SystemTime| age(now.duration_since(time).unwrap_or_default());
            [
                stored.key.to_string(),
                size_of_machine(info),
                size(stored.disk_bytes),
                built.map_or_else(|| "?".to_owned(), ago),
                ago(stored.used),
                info.map_or_else(|| "?".to_owned(), |info| info.kernel.display().to_string()),
            ]
        })
        .collect();
    table(
        ["TEMPLATE", "MACHINE", "DISK", "BUILT", "USED", "KERNEL"],
        &rows,
    )
}

fn rm(store: &TemplateStore, keys: &[String], all: bool) -> Result<()> {
    let keys = if all {
        list(store)?.into_iter().map(|stored| stored.key).collect()
    } else {
        chosen(store, keys)?
    };
    for key in keys {
        store.remove(&key).map_err(|e| CliError::new(chain(&e)))?;
        output::line(key.as_str())?;
    }
    Ok(())
}

/// Whether all are whole; without keys, every template.
fn verify(store: &TemplateStore, keys: &[String], json: bool) -> Result<bool> {
    let keys = if keys.is_empty() {
        list(store)?.into_iter().map(|stored| stored.key).collect()
    } else {
        chosen(store, keys)?
    };
    let mut results = Vec::new();
    for key in keys {
        let error = store.load(&key).err().map(|e| chain(&e));
        if !json {
            match &error {
                None => output::line(&format!("{GOOD}ok{GOOD:#}      {key}"))?,
                Some(error) => output::line(&format!("{BAD}damaged{BAD:#} {key}  {error}"))?,
            }
        }
        results.push(Verified {
            key: key.to_string(),
            ok: error.is_none(),
            error,
        });
    }
    if json {
        output::json(&results)?;
    }
    // An exit code of 1 says that one is damaged.
    Ok(results.iter().any(|result| !result.ok))
}

/// The templates whose keys begin with what was given.
fn chosen(store: &TemplateStore, wanted: &[String]) -> Result<Vec<TemplateKey>> {
    let templates = list(store)?;
    wanted
        .iter()
        .map(|wanted| {
            let mut matches = templates
                .iter()
                .filter(|stored| stored.key.as_str().starts_with(wanted.as_str()));
            match (matches.next(), matches.next()) {
                (Some(found), None) => Ok(found.key.clone()),
                (None, _) => Err(CliError::new(format!("there is no template {wanted}"))
                    .next("kuasar-ctl template ls")),
                (Some(_), Some(_)) => Err(CliError::new(format!(
                    "several templates begin with {wanted}"
                ))
                .next("give more of its key")),
            }
        })
        .collect()
}

fn view(stored: &Stored) -> View {
    let info = stored.info.as_ref();
    View {
        key: stored.key.to_string(),
        vcpus: info.map(|info| info.vcpus),
        memory_bytes: info.map(|info| info.memory_bytes),
        disk_bytes: stored.disk_bytes,
        built_at: info.map(|info| info.built_at),
        build_ms: info.map(|info| info.build_ms),
        kernel: info.map(|info| info.kernel.clone()),
        used_at: stored
            .used
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    }
}

fn size_of_machine(info: Option<&TemplateInfo>) -> String {
    info.map_or_else(
        || "?".to_owned(),
        |info| format!("{} vCPU, {}", info.vcpus, size(info.memory_bytes)),
    )
}
