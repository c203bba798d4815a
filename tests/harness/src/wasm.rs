//! Real WebAssembly programs for tests, made from the sources in `guests/` with clang and
//! wasi-libc, and into components with the published preview 1 adapter.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER,
    WASI_SNAPSHOT_PREVIEW1_PROXY_ADAPTER,
};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

const SUITE: &str = include_str!("../guests/suite.c");
const ECHO: &str = include_str!("../guests/echo.c");
const PROXY: &str = include_str!("../guests/proxy.c");
const WIT: &str = include_str!("../guests/wasi.wit");

/// Why guests cannot be built here, or `None` when they can.
#[must_use]
pub fn clang_missing() -> Option<String> {
    let headers = Path::new("/usr/include/wasm32-wasi/stdio.h");
    let lld = Command::new("wasm-ld").arg("--version").output();
    let clang = Command::new("clang").arg("--version").output();
    (clang.is_err() || lld.is_err() || !headers.exists()).then(|| {
        "building guests needs clang, lld, wasi-libc and libclang-rt-dev-wasm32 (scripts/setup)"
            .to_owned()
    })
}

/// The program of many uses in `guests/suite.c`, a module of preview 1.
#[must_use]
pub fn suite() -> Vec<u8> {
    compile(SUITE, &[])
}

/// [`suite`] as a component of WASI 0.2.
#[must_use]
pub fn suite_component() -> Vec<u8> {
    encode(&suite(), None, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER)
}

/// A TCP server, a component.
#[must_use]
pub fn echo() -> Vec<u8> {
    let module = compile(ECHO, &[]);
    encode(
        &module,
        Some("echo"),
        WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER,
    )
}

/// An HTTP server, a component of the world `wasi:http/proxy`.
#[must_use]
pub fn proxy() -> Vec<u8> {
    let flags = ["-nostdlib", "-Wl,--no-entry"];
    let module = compile(PROXY, &flags);
    encode(&module, Some("proxy"), WASI_SNAPSHOT_PREVIEW1_PROXY_ADAPTER)
}

/// Writes `program` to a file that stays until the test's folder goes.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn file(dir: &Path, name: &str, program: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, program).expect("writing a guest");
    path
}

/// Compiles C once for all tests of this build.
fn compile(source: &str, flags: &[&str]) -> Vec<u8> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut digest = Sha256::new();
    digest.update(source);
    digest.update(flags.join(" "));
    let digest = digest.finalize();
    let name: String = digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let dir = super::bin_dir().join("wasm-guests");
    std::fs::create_dir_all(&dir).expect("folder for guests");
    let built = dir.join(format!("{name}.wasm"));
    if let Ok(program) = std::fs::read(&built) {
        return program;
    }
    // Other processes build the same: a name of our own, then a rename.
    let work = tempfile::tempdir_in(&dir).expect("folder for a build");
    let (input, output) = (work.path().join("guest.c"), work.path().join("guest.wasm"));
    std::fs::write(&input, source).expect("source of a guest");
    let compiled = Command::new("clang")
        .args([
            "--target=wasm32-wasi",
            "--sysroot=/usr",
            "-O2",
            "-Wl,--strip-debug",
        ])
        .args(flags)
        .arg("-o")
        .args([&output, &input])
        .output()
        .expect("clang runs");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    std::fs::rename(&output, &built).expect("keeping a guest");
    std::fs::read(&built).expect("reading a guest")
}

fn encode(module: &[u8], world: Option<&str>, adapter: &[u8]) -> Vec<u8> {
    let mut module = module.to_vec();
    if let Some(world) = world {
        let mut resolve = Resolve::default();
        let package = resolve
            .push_str("wasi.wit", WIT)
            .expect("WIT of the guests");
        let world = resolve
            .select_world(&[package], Some(world))
            .expect("world of a guest");
        embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
            .expect("describing a guest");
    }
    ComponentEncoder::default()
        .module(&module)
        .and_then(|encoder| encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, adapter))
        .and_then(|encoder| encoder.validate(true).encode())
        .expect("making a component")
}
