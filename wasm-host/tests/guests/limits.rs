//! Memory, CPU, time and handles, and who else notices.

use super::*;
use wasm_host::{CpuQuota, Limits};

fn limited(args: &[&str], limits: Limits) -> Settings {
    Settings {
        limits,
        ..settings(args)
    }
}

const MIB: u64 = 1 << 20;

fn memory(bytes: u64) -> Limits {
    Limits {
        memory_bytes: Some(bytes),
        ..Default::default()
    }
}

#[tokio::test]
async fn memory_ends_at_the_limit_and_is_given_back() {
    harness::skip_if!(harness::wasm::clang_missing());
    // A host of its own, to see all of its memory.
    let host = Host::new(HostConfig {
        max_instances: 16,
        total_memory_bytes: 64 * MIB,
        ..Default::default()
    })
    .unwrap();
    let program = host
        .load_bytes("suite", &harness::wasm::suite())
        .await
        .unwrap();
    let start = async |settings: Settings| {
        let (stdout, out) = tokio::io::duplex(1 << 16);
        let (stderr, err) = tokio::io::duplex(1 << 16);
        let stdio = Stdio {
            stdout: Some(Box::new(out)),
            stderr: Some(Box::new(err)),
            ..Default::default()
        };
        let container = host.container(settings);
        let process = container.start(lane(), &program, stdio).await.unwrap();
        Started {
            container,
            process,
            stdout,
            stderr,
        }
    };
    let hog = start(limited(&["eat", "100"], memory(16 * MIB))).await;
    let container = hog.container.clone();
    let (exit, out, err) = hog.end().await;
    assert!(out.starts_with("refused after 1"), "{out}");
    assert_eq!((exit.code, exit.ended), (3, Ended::OutOfMemory));
    assert!(err.contains("out of memory"), "{err}");
    let stats = container.stats();
    assert!(stats.memory_peak_bytes > 8 * MIB && stats.memory_peak_bytes <= 16 * MIB);
    assert_eq!((stats.memory_bytes, stats.out_of_memory), (0, 1));

    // Together they have no more than the host gives; whoever comes first has it.
    let mut holder = start(settings(&["eat", "40", "3600"])).await;
    holder.says("have 40").await;
    let (exit, out, _) = start(settings(&["eat", "40"])).await.end().await;
    assert!(out.starts_with("refused after"), "{out}");
    assert_eq!(exit.ended, Ended::OutOfMemory);
    holder.process.signal(9);
    holder.end().await;
    assert_eq!(host.memory_bytes(), 0);
    let (exit, out, _) = start(settings(&["eat", "40"])).await.end().await;
    assert_eq!((exit.code, out.as_str()), (0, "have 40\n"));
}

#[tokio::test]
async fn a_limit_below_the_start_is_refused() {
    let program = load(b"(module (memory 4) (func (export \"_start\")))").await;
    let container = host().container(limited(&[], memory(100_000)));
    let error = container
        .start(lane(), &program, Stdio::default())
        .await
        .unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("262144") && error.contains("100000"),
        "{error}"
    );
    let container = host().container(limited(&[], memory(262_144)));
    let process = container
        .start(lane(), &program, Stdio::default())
        .await
        .unwrap();
    assert_eq!(process.wait().await.code, 0);
}

#[tokio::test]
async fn a_quota_is_kept() {
    harness::skip_if!(harness::wasm::clang_missing());
    let quota = CpuQuota {
        // Less than a turn: one is enough to be held back.
        quota: Duration::from_millis(2),
        period: Duration::from_millis(100),
    };
    let limits = Limits {
        cpu_quota: Some(quota),
        wall_time: Some(Duration::from_secs(2)),
        ..Default::default()
    };
    let lane = Lane::start(LaneConfig::default()).unwrap();
    let started = start_on(&lane, &suite().await, limited(&["spin"], limits)).await;
    let container = started.container.clone();
    let (exit, _, _) = started.end().await;
    assert_eq!((exit.code, exit.ended), (137, Ended::WallTime));
    let stats = container.stats();
    // A fiftieth of two seconds; without the quota it would be nearly all of them.
    assert!(stats.cpu < Duration::from_secs(1), "{stats:?}");
    assert!(stats.cpu > Duration::ZERO, "{stats:?}");
    assert!(
        stats.throttled > 0 && stats.throttled_time > Duration::ZERO,
        "{stats:?}"
    );
}

/// Lets all of them compute for a second of CPU time together: how much each had.
async fn shared_out(hogs: &[Started]) -> Vec<Duration> {
    let cpu = || -> Vec<Duration> {
        let all = hogs.iter().map(|hog| hog.container.stats().cpu);
        all.collect()
    };
    let before = cpu();
    let had = || -> Vec<Duration> { cpu().iter().zip(&before).map(|(n, b)| *n - *b).collect() };
    let second = async {
        while had().iter().sum::<Duration>() < Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, second).await.expect("they run");
    had()
}

#[tokio::test]
async fn shares_weigh_containers_of_a_pod() {
    harness::skip_if!(harness::wasm::clang_missing());
    let lane = Lane::start(LaneConfig::default()).unwrap();
    let mut hogs = Vec::new();
    for cpu_shares in [512, 1 << 18] {
        let limits = Limits {
            cpu_shares,
            ..Default::default()
        };
        hogs.push(start_on(&lane, &suite().await, limited(&["spin"], limits)).await);
    }
    let had = shared_out(&hogs).await;
    // Their turns are twenty to one in time, of which a busy machine takes more of the longer.
    assert!(had[1] > had[0] * 2, "{had:?}");
    hogs.iter().for_each(|hog| hog.process.signal(9));
}

#[tokio::test]
async fn pods_share_a_cpu_evenly_however_many_programs_they_have() {
    harness::skip_if!(harness::wasm::clang_missing());
    // Threads inherit where they may run: both lanes on one CPU.
    let lanes = std::thread::spawn(|| {
        let mut one = nix::sched::CpuSet::new();
        let me = nix::unistd::Pid::from_raw(0);
        let mine = nix::sched::sched_getaffinity(me).unwrap();
        let first = (0..nix::sched::CpuSet::count()).find(|&cpu| mine.is_set(cpu) == Ok(true));
        one.set(first.unwrap()).unwrap();
        nix::sched::sched_setaffinity(me, &one).unwrap();
        [0, 1].map(|_| Lane::start(LaneConfig::default()).unwrap())
    });
    let [greedy, modest] = lanes.join().unwrap();
    let mut hogs = Vec::new();
    for lane in [&modest, &greedy, &greedy, &greedy, &greedy, &greedy] {
        hogs.push(start_on(lane, &suite().await, settings(&["spin"])).await);
    }
    let had = shared_out(&hogs).await;
    let (modest, greedy) = (had[0], had[1..].iter().sum::<Duration>());
    assert!(modest * 2 > greedy && modest < greedy * 2, "{had:?}");
    hogs.iter().for_each(|hog| hog.process.signal(9));
}

#[tokio::test]
async fn handles_of_waiting_guests_are_counted() {
    harness::skip_if!(harness::wasm::clang_missing());
    let dir = tempfile::tempdir().unwrap();
    let hold = |n: &'static str| Settings {
        mounts: vec![wasm_host::Mount {
            host: dir.path().to_owned(),
            guest: "/d".to_owned(),
            read_only: true,
        }],
        ..settings(&["hold", "/d", n])
    };
    let mut few = start(&suite().await, hold("0")).await;
    few.says("0 files").await;
    let mut more = start(&suite().await, hold("40")).await;
    more.says("40 files").await;
    let counted = |started: &Started| started.container.stats().handles;
    // They go on from their last word to their sleep.
    let limit = tokio::time::timeout(LIMIT, async {
        while counted(&more) < counted(&few) + 40 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    limit.await.expect("all are counted");
    let container = more.container.clone();
    for started in [few, more] {
        started.process.signal(9);
        started.end().await;
    }
    assert_eq!(container.stats().handles, 0);
}

#[tokio::test]
async fn instances_and_memories_are_limited() {
    harness::skip_if!(harness::wasm::clang_missing());
    let several = load(&harness::wasm::suite_component()).await;
    let two = load(b"(module (memory 1) (memory 1) (func (export \"_start\")))").await;
    let one = Limits {
        instances: 1,
        memories: 1,
        tables: 1,
        ..Default::default()
    };
    for program in [several, two] {
        let container = host().container(limited(&[], one.clone()));
        let error = container
            .start(lane(), &program, Stdio::default())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("limit"), "{error}");
        let started = start(&program, settings(&["args"])).await;
        assert_eq!(started.end().await.0.code, 0);
    }
}

#[tokio::test]
async fn a_hog_takes_only_its_turns() {
    harness::skip_if!(harness::wasm::clang_missing());
    let mut hogs = Vec::new();
    for _ in 0..3 {
        hogs.push(start(&suite().await, settings(&["spin"])).await);
    }
    // On the same thread as the hogs.
    let (code, out, _) = run(&suite().await, settings(&["clocks"])).await;
    assert_eq!((code, out.as_str()), (0, "ok\n"));
    for hog in hogs {
        hog.process.signal(9);
        assert_eq!(hog.end().await.0.code, 137);
    }
}

#[tokio::test]
async fn handles_and_tables_are_limited() {
    harness::skip_if!(harness::wasm::clang_missing());
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        handles: 50,
        ..Default::default()
    };
    let mut few = limited(&["many", "/d"], limits);
    few.mounts = vec![wasm_host::Mount {
        host: dir.path().to_owned(),
        guest: "/d".to_owned(),
        read_only: true,
    }];
    // A failure of a host function, which ends the one that called it.
    let (exit, out, err) = start(&suite().await, few.clone()).await.end().await;
    assert_eq!((exit.code, out.as_str()), (134, ""), "{err}");
    assert!(err.contains("no free keys"), "{err}");
    few.args = vec!["suite".into(), "hold".into(), "/d".into(), "40".into()];
    let mut enough = start(&suite().await, few).await;
    enough.says("40 files").await;
    enough.process.signal(9);
    enough.end().await;

    let program = load(
        b"(module (table 1 funcref) (func (export \"_start\")
            (if (i32.ne (table.grow (ref.null func) (i32.const 1000)) (i32.const -1))
              (then unreachable))))",
    )
    .await;
    let limits = Limits {
        table_elements: 100,
        ..Default::default()
    };
    let (code, _, err) = run(&program, limited(&[], limits)).await;
    assert_eq!(code, 0, "{err}");
}
