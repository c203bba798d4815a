//! Folders of the host in a container, and the way out of them that there must not be.

use super::*;
use std::os::unix::fs::symlink;
use wasm_host::Mount;

fn with_mounts(args: &[&str], mounts: &[(&std::path::Path, &str, bool)]) -> Settings {
    let mounts = mounts.iter().map(|&(host, guest, read_only)| Mount {
        host: host.to_owned(),
        guest: guest.to_owned(),
        read_only,
    });
    Settings {
        mounts: mounts.collect(),
        ..settings(args)
    }
}

#[tokio::test]
async fn files_work_as_programs_expect() {
    harness::skip_if!(harness::wasm::clang_missing());
    for program in [suite().await, load(&harness::wasm::suite_component()).await] {
        let dir = tempfile::tempdir().unwrap();
        let all = with_mounts(&["files", "/data"], &[(dir.path(), "/data", false)]);
        let (code, out, err) = run(&program, all).await;
        assert_eq!(
            (code, out.as_str()),
            (0, "ok\n"),
            "{}: {err}",
            program.kind()
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn mounts_keep_their_places_and_modes() {
    harness::skip_if!(harness::wasm::clang_missing());
    let (root, data, config) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    std::fs::create_dir(root.path().join("data")).unwrap();
    std::fs::write(root.path().join("data/hidden"), "").unwrap();
    std::fs::write(config.path().join("key"), "value\n").unwrap();
    let mounts = [
        (root.path(), "/", false),
        (data.path(), "/data", false),
        (config.path(), "/data/config", true),
    ];
    let program = suite().await;
    let run = async |args: &[&str]| run(&program, with_mounts(args, &mounts)).await;
    assert_eq!(run(&["put", "/data/new", "text"]).await.0, 0);
    assert_eq!(
        std::fs::read_to_string(data.path().join("new")).unwrap(),
        "text"
    );
    assert_eq!(
        run(&["list", "/data"]).await.1,
        "new\n",
        "a mount hides what is below"
    );
    assert_eq!(run(&["get", "/data/config/key"]).await.1, "value\n");
    for args in [
        &["put", "/data/config/key", "x"],
        &["put", "/data/config/new", "x"],
    ] {
        assert_eq!(run(args).await.0, 1, "{args:?}");
    }
    assert_eq!(run(&["put", "/top", "x"]).await.0, 0);
    assert!(root.path().join("top").exists());
    let missing = with_mounts(&[], &[("/nonexistent".as_ref(), "/x", true)]);
    let container = host().container(missing);
    let error = container
        .start(lane(), &program, Stdio::default())
        .await
        .unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("/nonexistent") && error.contains("/x"),
        "{error}"
    );
}

#[tokio::test]
async fn there_is_no_way_out_of_a_mount() {
    harness::skip_if!(harness::wasm::clang_missing());
    let top = tempfile::tempdir().unwrap();
    let inside = top.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(top.path().join("secret"), "secret").unwrap();
    std::fs::write(inside.join("open"), "open").unwrap();
    symlink("/etc/passwd", inside.join("absolute")).unwrap();
    symlink("../secret", inside.join("relative")).unwrap();
    symlink("..", inside.join("up")).unwrap();
    symlink("/proc/self/root/etc/passwd", inside.join("magic")).unwrap();
    symlink("open", inside.join("fine")).unwrap();
    for program in [suite().await, load(&harness::wasm::suite_component()).await] {
        let run =
            async |args: &[&str]| run(&program, with_mounts(args, &[(&inside, "/m", false)])).await;
        assert_eq!(run(&["get", "/m/fine"]).await.1, "open");
        for path in [
            "/m/absolute",
            "/m/relative",
            "/m/up/secret",
            "/m/magic",
            "/m/../secret",
            "/m/./../../etc/passwd",
            "/secret",
            "/etc/passwd",
            "../secret",
        ] {
            let (code, out, _) = run(&["get", path]).await;
            assert!(
                code == 1 && !out.starts_with("secret") && !out.contains("root:"),
                "{path}: {out}"
            );
        }
        for (target, link) in [("../secret", "/m/made"), ("/etc/passwd", "/m/made2")] {
            let (_, out, _) = run(&["follow", target, link]).await;
            assert!(
                !out.starts_with("secret") && !out.contains("root:"),
                "{out}"
            );
        }
        for path in ["/m/up/new", "/m/../new", "/m/relative"] {
            assert_eq!(run(&["put", path, "changed"]).await.0, 1, "{path}");
        }
    }
    assert!(!top.path().join("new").exists());
    assert_eq!(
        std::fs::read_to_string(top.path().join("secret")).unwrap(),
        "secret"
    );
}

#[tokio::test]
async fn a_confined_thread_serves_files_and_clocks() {
    harness::skip_if!(harness::wasm::clang_missing());
    let lane = Lane::start(LaneConfig {
        name: "confined".to_owned(),
        seccomp: true,
        ..Default::default()
    })
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    for program in [suite().await, load(&harness::wasm::suite_component()).await] {
        let mounts = [(dir.path(), "/d", false)];
        for args in [&["files", "/d"][..], &["clocks"]] {
            let started = start_on(&lane, &program, with_mounts(args, &mounts)).await;
            let (exit, out, err) = started.end().await;
            assert_eq!((exit.code, out.as_str()), (0, "ok\n"), "{args:?}: {err}");
        }
        let overflow = start_on(&lane, &program, settings(&["overflow"])).await;
        assert_eq!(overflow.end().await.0.code, 134);
    }
}
