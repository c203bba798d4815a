//! Real programs in containers of one host: C compiled by clang, text, components.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module
)]

mod components;
mod control;
mod files;
mod limits;
mod programs;
mod scale;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use wasm_host::{
    Container, Ended, Exit, Host, HostConfig, Lane, LaneConfig, Process, Program, Settings, Stdio,
};

/// The longest that anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| Host::new(HostConfig::default()).expect("an engine"))
}

fn lane() -> &'static Lane {
    static LANE: OnceLock<Lane> = OnceLock::new();
    LANE.get_or_init(|| Lane::start(LaneConfig::default()).expect("a lane"))
}

async fn load(bytes: &[u8]) -> Arc<Program> {
    host().load_bytes("guest", bytes).await.expect("a program")
}

async fn suite() -> Arc<Program> {
    load(&harness::wasm::suite()).await
}

fn settings(args: &[&str]) -> Settings {
    let args = std::iter::once("suite").chain(args.iter().copied());
    Settings {
        args: args.map(str::to_owned).collect(),
        ..Default::default()
    }
}

/// A program under way, with what it writes.
struct Started {
    container: Container,
    process: Process,
    stdout: tokio::io::DuplexStream,
    stderr: tokio::io::DuplexStream,
}

impl Started {
    /// Waits for text on stdout.
    async fn says(&mut self, text: &str) {
        let mut seen = Vec::new();
        let reading = async {
            while !String::from_utf8_lossy(&seen).contains(text) {
                let byte = self.stdout.read_u8().await;
                seen.push(byte.unwrap_or_else(|_| panic!("ended before {text:?}")));
            }
        };
        let said = tokio::time::timeout(LIMIT, reading).await.is_ok();
        assert!(said, "never said {text:?}");
    }

    /// The end, and all that was written until then.
    async fn end(mut self) -> (Exit, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        let all = async {
            let (exit, _, _) = tokio::join!(
                self.process.wait(),
                self.stdout.read_to_string(&mut out),
                self.stderr.read_to_string(&mut err),
            );
            exit
        };
        let exit = tokio::time::timeout(LIMIT, all)
            .await
            .expect("the guest ends");
        (exit, out, err)
    }
}

async fn start_on(lane: &Lane, program: &Arc<Program>, settings: Settings) -> Started {
    let (stdout, out) = tokio::io::duplex(1 << 16);
    let (stderr, err) = tokio::io::duplex(1 << 16);
    let stdio = Stdio {
        stdin: None,
        stdout: Some(Box::new(out)),
        stderr: Some(Box::new(err)),
        terminal: false,
    };
    let container = host().container(settings);
    let process = container.start(lane, program, stdio).await.expect("starts");
    Started {
        container,
        process,
        stdout,
        stderr,
    }
}

async fn start(program: &Arc<Program>, settings: Settings) -> Started {
    start_on(lane(), program, settings).await
}

async fn run(program: &Arc<Program>, settings: Settings) -> (u32, String, String) {
    let (exit, out, err) = start(program, settings).await.end().await;
    (exit.code, out, err)
}

#[tokio::test]
async fn a_guest_gets_what_it_is_given_and_nothing_else() {
    harness::skip_if!(harness::wasm::clang_missing());
    for program in [
        load(&harness::wasm::suite()).await,
        load(&harness::wasm::suite_component()).await,
    ] {
        let kind = program.kind();
        let (code, out, _) = run(&program, settings(&["args", "a b", ""])).await;
        assert_eq!((code, out.as_str()), (0, "suite\nargs\na b\n\n"), "{kind}");
        let mut granted = settings(&["env"]);
        let (_, out, _) = run(&program, granted.clone()).await;
        assert_eq!(out, "", "{kind}: no environment of the host");
        granted.env = vec![("A".into(), "1".into()), ("B".into(), "x=y".into())];
        let (_, out, _) = run(&program, granted).await;
        assert_eq!(out, "A=1\nB=x=y\n", "{kind}");
        let (_, out, err) = run(&program, settings(&["say", "out", "err"])).await;
        assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"), "{kind}");
        let (_, out, _) = run(&program, settings(&["tty"])).await;
        assert_eq!(out, "000\n", "{kind}");
        let (code, out, _) = run(&program, settings(&["clocks"])).await;
        assert_eq!((code, out.as_str()), (0, "ok\n"), "{kind}");
        let (code, _, _) = run(&program, settings(&["get", "/etc/passwd"])).await;
        assert_eq!(code, 1, "{kind}: no files of the host");
    }
}

#[tokio::test]
async fn exit_codes_are_the_guests_own() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = suite().await;
    for code in ["0", "1", "42", "125", "126", "137", "255"] {
        let (exit, _, _) = start(&program, settings(&["exit", code])).await.end().await;
        assert_eq!(exit.code.to_string(), code);
        assert_eq!(exit.ended, Ended::Exited);
    }
}

#[tokio::test]
async fn stdin_ends_and_output_is_complete() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = suite().await;
    let (mut out_reader, out) = tokio::io::duplex(16);
    let text = "through a guest ".repeat(2000);
    let stdio = Stdio {
        stdin: Some(Box::new(std::io::Cursor::new(text.clone().into_bytes()))),
        stdout: Some(Box::new(out)),
        ..Default::default()
    };
    let container = host().container(settings(&["cat"]));
    let process = container.start(lane(), &program, stdio).await.unwrap();
    let mut read = String::new();
    out_reader.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, text);
    assert_eq!(process.wait().await.code, 0);

    let (code, out, _) = run(&program, settings(&["flood", "20000"])).await;
    assert_eq!((code, out.lines().count()), (0, 20000));
}

#[tokio::test]
async fn a_reader_that_goes_away_is_a_closed_pipe() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = suite().await;
    let mut started = start(&program, settings(&["flood", "1000000"])).await;
    started.says("line 10 ").await;
    let process = started.process.clone();
    drop(started);
    let exit = tokio::time::timeout(LIMIT, process.wait()).await.unwrap();
    assert_ne!(exit.code, 134, "{:?}", exit.ended);
}
