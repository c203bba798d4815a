//! Which files are programs, and what is said of the others.

use super::*;
use wasm_host::{CacheConfig, WasmError};

const HELLO: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 8) "\10\00\00\00\03\00\00\00")
  (data (i32.const 16) "hi\n")
  (func (export "_start") (drop (call $write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 0)))))"#;

#[tokio::test]
async fn text_runs_like_binary() {
    let (code, out, _) = run(&load(HELLO.as_bytes()).await, settings(&[])).await;
    assert_eq!((code, out.as_str()), (0, "hi\n"));
    let binary = wat::parse_str(HELLO).unwrap();
    assert_eq!(run(&load(&binary).await, settings(&[])).await.1, "hi\n");
}

#[tokio::test]
async fn what_cannot_run_is_refused_in_words() {
    let binary = wat::parse_str(HELLO).unwrap();
    let cases: &[(&[u8], &str)] = &[
        (b"", "an empty file"),
        (b"\x7fELF\x02\x01\x01", "a Linux program (ELF)"),
        (b"#!/bin/sh\n", "a script"),
        (b"MZ\x90", "unknown format"),
        (&binary[..binary.len() / 2], "no valid WebAssembly"),
        (b"\0asm\x01\0\0\0\xff", "no valid WebAssembly"),
        (b"\0asm\x09\0\0\0", "its version is"),
        (b"(module (func) (", "no valid WebAssembly text"),
        (b"(module (func (i32.add)) )", "no valid WebAssembly"),
        (b"(module)", "no function `_start`"),
        (b"(module (func (export \"add\")))", "it exports add"),
        (b"(component)", "neither wasi:cli/run nor wasi:http/incoming-handler"),
        (
            b"(module (import \"env\" \"f\" (func)) (import \"x\" \"g\" (func)) (func (export \"_start\")))",
            "env::f, x::g",
        ),
        (
            b"(component (import \"a:b/c\" (instance (export \"f\" (func)))))",
            "a:b/c",
        ),
        (
            b"(module (memory 1 1 shared) (func (export \"_start\")))",
            "threads",
        ),
        (
            b"(module (type (struct)) (func (export \"_start\")))",
            "no valid WebAssembly",
        ),
    ];
    for (bytes, part) in cases {
        let error = host()
            .load_bytes("app.wasm", bytes)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("app.wasm ") && error.contains(part),
            "{:?}: {error}",
            String::from_utf8_lossy(bytes)
        );
    }
}

#[tokio::test]
async fn code_compiled_elsewhere_is_not_taken() {
    let engine = wasmtime::Engine::default();
    let code = engine.precompile_module(HELLO.as_bytes());
    let code = code
        .or_else(|_| engine.precompile_module(&wat::parse_str(HELLO).unwrap()))
        .unwrap();
    let error = host()
        .load_bytes("app.cwasm", &code)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("compiled already"), "{error}");
}

#[tokio::test]
async fn sizes_are_limited() {
    let small = Host::new(HostConfig {
        max_instances: 4,
        max_program_bytes: 100,
        ..Default::default()
    })
    .unwrap();
    let error = small.load_bytes("big.wasm", &[0; 101]).await.unwrap_err();
    assert!(
        matches!(
            error,
            WasmError::TooLarge {
                bytes: 101,
                limit: 100,
                ..
            }
        ),
        "{error}"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = harness::wasm::file(dir.path(), "big.wasm", &[0; 200]);
    let error = small.load(&path).await.unwrap_err().to_string();
    assert!(error.contains("big.wasm has 200 bytes"), "{error}");
    let error = small.load(dir.path()).await.unwrap_err().to_string();
    assert!(error.contains("no regular file"), "{error}");
    let error = small
        .load("/nonexistent".as_ref())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent"), "{error}");
}

#[tokio::test]
async fn many_askers_share_one_compilation_and_the_cache_outlives_the_host() {
    harness::skip_if!(harness::wasm::clang_missing());
    let dir = tempfile::tempdir().unwrap();
    let config = HostConfig {
        max_instances: 64,
        cache: Some(CacheConfig {
            dir: dir.path().join("cache"),
            key: dir.path().join("key"),
            max_bytes: 1 << 30,
        }),
        ..Default::default()
    };
    let path = harness::wasm::file(dir.path(), "suite.wasm", &harness::wasm::suite());
    let first = Host::new(config.clone()).unwrap();
    let asking = (0..16).map(|_| first.load(&path));
    let programs = futures::future::join_all(asking).await;
    let one = programs[0].as_ref().unwrap();
    for program in &programs {
        assert!(Arc::ptr_eq(one, program.as_ref().unwrap()));
    }
    let cached = || std::fs::read_dir(dir.path().join("cache")).unwrap().count();
    assert_eq!(cached(), 1);
    drop((programs, first));

    let second = Host::new(config).unwrap();
    let program = second.load(&path).await.unwrap();
    assert_eq!(cached(), 1);
    let container = second.container(settings(&["exit", "7"]));
    let process = container
        .start(lane(), &program, Stdio::default())
        .await
        .unwrap();
    assert_eq!(process.wait().await.code, 7);
    // What the file holds counts, not its name.
    std::fs::write(&path, "(module (func (export \"_start\")))").unwrap();
    let other = second.load(&path).await.unwrap();
    assert!(!Arc::ptr_eq(&program, &other));
    let container = second.container(settings(&[]));
    let process = container
        .start(lane(), &other, Stdio::default())
        .await
        .unwrap();
    assert_eq!(process.wait().await.code, 0);
}
