//! Signals, pauses and ends, of guests that compute and of guests that wait.

use super::*;
use tokio::io::AsyncWriteExt;

async fn spinning() -> Started {
    let mut started = start(&suite().await, settings(&["spin"])).await;
    started.says("spinning").await;
    started
}

async fn sleeping() -> Started {
    let mut started = start(&suite().await, settings(&["sleep", "3600"])).await;
    started.says("sleeping").await;
    started
}

#[tokio::test]
async fn signals_end_guests_that_compute_and_guests_that_wait() {
    harness::skip_if!(harness::wasm::clang_missing());
    for signal in [2, 9, 15] {
        for started in [spinning().await, sleeping().await] {
            started.process.signal(signal);
            let (exit, _, _) = started.end().await;
            assert_eq!(
                (exit.code, exit.ended),
                (128 + signal, Ended::Signal(signal))
            );
        }
    }
}

#[tokio::test]
async fn a_guest_that_waits_for_input_is_ended() {
    harness::skip_if!(harness::wasm::clang_missing());
    let (silent, stdin) = tokio::io::duplex(16);
    let container = host().container(settings(&["cat"]));
    let stdio = Stdio {
        stdin: Some(Box::new(stdin)),
        ..Default::default()
    };
    let process = container
        .start(lane(), &suite().await, stdio)
        .await
        .unwrap();
    process.signal(15);
    assert_eq!(process.wait().await.code, 143);
    drop(silent);
}

#[tokio::test]
async fn a_guest_that_waits_for_a_file_is_ended() {
    harness::skip_if!(harness::wasm::clang_missing());
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut opening = settings(&["get", "/d/fifo"]);
    opening.mounts = vec![wasm_host::Mount {
        host: dir.path().to_owned(),
        guest: "/d".to_owned(),
        read_only: false,
    }];
    let lane = Lane::start(LaneConfig::default()).unwrap();
    let started = start_on(&lane, &suite().await, opening).await;
    started.process.signal(15);
    assert_eq!(started.end().await.0.code, 143);
    // Its helper thread is let go.
    let _ = std::fs::File::options().write(true).read(true).open(fifo);
}

#[tokio::test]
async fn a_paused_guest_does_not_leave_its_host_call() {
    harness::skip_if!(harness::wasm::clang_missing());
    let (mut typed, stdin) = tokio::io::duplex(64);
    let (mut reader, out) = tokio::io::duplex(64);
    let container = host().container(settings(&["cat"]));
    let stdio = Stdio {
        stdin: Some(Box::new(stdin)),
        stdout: Some(Box::new(out)),
        ..Default::default()
    };
    let process = container
        .start(lane(), &suite().await, stdio)
        .await
        .unwrap();
    container.pause();
    typed.write_all(b"held").await.unwrap();
    drop(typed);
    let held = tokio::time::timeout(Duration::from_millis(300), process.wait()).await;
    assert!(held.is_err(), "it went on: {held:?}");
    container.resume();
    let mut said = String::new();
    reader.read_to_string(&mut said).await.unwrap();
    assert_eq!((process.wait().await.code, said.as_str()), (0, "held"));
}

#[tokio::test]
async fn a_paused_guest_takes_no_cpu_until_it_goes_on() {
    harness::skip_if!(harness::wasm::clang_missing());
    let started = spinning().await;
    started.container.pause();
    // Whatever was under way ends within a few ticks.
    let mut last = started.container.stats().cpu;
    let held = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let cpu = started.container.stats().cpu;
            if cpu == last {
                break;
            }
            last = cpu;
        }
    };
    tokio::time::timeout(LIMIT, held)
        .await
        .expect("it stands still");
    started.container.resume();
    let goes_on = async {
        while started.container.stats().cpu == last {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, goes_on)
        .await
        .expect("it goes on");
    started.container.pause();
    started.process.signal(9);
    assert_eq!(
        started.end().await.0.code,
        137,
        "a paused guest can be killed"
    );
}

#[tokio::test]
async fn execs_share_their_containers_life_and_memory() {
    harness::skip_if!(harness::wasm::clang_missing());
    let first = sleeping().await;
    let before = first.container.stats();
    let (mut reader, out) = tokio::io::duplex(1 << 10);
    let stdio = Stdio {
        stdout: Some(Box::new(out)),
        ..Default::default()
    };
    let exec = settings(&["args", "second"]);
    let second = first
        .container
        .exec(lane(), &suite().await, stdio, exec)
        .await
        .unwrap();
    let mut said = String::new();
    reader.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "suite\nargs\nsecond\n");
    assert_eq!(second.wait().await.code, 0);

    let exec = settings(&["sleep", "3600"]);
    let third = first
        .container
        .exec(lane(), &suite().await, Stdio::default(), exec)
        .await
        .unwrap();
    let stats = first.container.stats();
    assert_eq!(stats.memory_bytes, 2 * before.memory_bytes);
    assert_eq!(stats.processes, 2);
    third.signal(15);
    assert_eq!(third.wait().await.code, 143);
    assert_eq!(first.process.exit(), None, "a signal to an exec is its own");
    first.container.kill();
    let (exit, _, _) = first.end().await;
    assert_eq!(exit.code, 137);
}

#[tokio::test]
async fn a_trap_ends_one_guest_and_says_why() {
    harness::skip_if!(harness::wasm::clang_missing());
    let bystander = sleeping().await;
    for (what, why) in [("abort", "unreachable"), ("overflow", "stack")] {
        let (exit, _, err) = start(&suite().await, settings(&[what])).await.end().await;
        assert_eq!(exit.code, 134, "{err}");
        assert!(err.contains(why), "{err}");
        assert!(matches!(exit.ended, Ended::Trap(_)));
    }
    assert_eq!(bystander.process.exit(), None);
    bystander.process.signal(9);
    bystander.end().await;
}

#[tokio::test]
async fn a_start_function_that_never_ends_can_be_killed() {
    let program =
        load(b"(module (func $f (loop (br 0))) (start $f) (func (export \"_start\")))").await;
    let started = start(&program, settings(&[])).await;
    started.process.signal(9);
    assert_eq!(started.end().await.0.code, 137);
}

#[tokio::test]
async fn a_terminal_is_one_for_the_guest() {
    harness::skip_if!(harness::wasm::clang_missing());
    let (mut user, stdio) = wasm_host::Terminal::open().unwrap();
    // The guest's streams belong to this event loop, so it runs elsewhere all the same.
    let container = host().container(settings(&["tty"]));
    let process = container
        .start(lane(), &suite().await, stdio)
        .await
        .unwrap();
    let mut said = String::new();
    user.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "111\r\n");
    assert_eq!(process.wait().await.code, 0);
}
