//! Containers in the real agent, as the host sees them.
#![allow(missing_docs, clippy::tests_outside_test_module)]

mod common;

use agent_api::rpc::{
    ContainerRef, EventsRequest, Mount, ResizePtyRequest, SetupSandboxRequest, Stdio,
    UpdateContainerRequest, event,
};
use common::{Bed, code, ctx, message, outputs, process, shell, soon, spec, unique};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use ttrpc::proto::Code;

#[tokio::test]
async fn output_errors_and_exit_codes() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("out");
    let spec1 = shell(&bed, "echo hello; echo oops >&2; exit 7");
    assert_eq!(
        bed.run(&id, &spec1).await,
        (7, "hello\n".into(), "oops\n".into())
    );
    // The id is free again; signals have their default actions inside.
    let spec2 = shell(&bed, "sh -c 'kill -15 $$'; echo $?");
    assert_eq!(bed.run(&id, &spec2).await.1, "143\n");
    // A broken pipe kills the writer: SIGPIPE is not ignored.
    let spec3 = shell(&bed, "yes | head -1");
    assert_eq!(bed.run(&id, &spec3).await, (0, "y\n".into(), String::new()));
}

#[tokio::test]
async fn a_megabyte_arrives_intact() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let script = "i=0; while [ $i -lt 16384 ]; do printf '%063d\\n' $i; i=$((i+1)); done";
    let spec = shell(&bed, script);
    let (code, out, _) = bed.run(&unique("mega"), &spec).await;
    assert_eq!((code, out.len()), (0, 1 << 20));
    for (i, line) in out.lines().enumerate() {
        assert_eq!(line.parse::<usize>().unwrap(), i);
    }
}

#[tokio::test]
async fn input_reaches_the_process_and_ends() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("in");
    let stdio = Stdio {
        stdin: true,
        ..outputs()
    };
    bed.create(&id, &spec(&bed, json!(["wc", "-c"])), stdio)
        .await
        .unwrap();
    bed.start_process(&id, "").await.unwrap();
    let (mut input, mut output) = (
        bed.stream(&id, "", "stdin").await,
        bed.stream(&id, "", "stdout").await,
    );
    let _err = bed.stream(&id, "", "stderr").await;
    input.write_all(&vec![b'x'; 300_000]).await.unwrap();
    input.shutdown().await.unwrap();
    let mut text = String::new();
    soon(output.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text.trim(), "300000");
    assert_eq!(bed.exit_of(&id, "").await.code, 0);
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn close_stdin_ends_the_input() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("close");
    let stdio = Stdio {
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let (mut input, mut output) = (
        bed.stream(&id, "", "stdin").await,
        bed.stream(&id, "", "stdout").await,
    );
    bed.create(&id, &spec(&bed, json!(["cat"])), stdio)
        .await
        .unwrap();
    bed.start_process(&id, "").await.unwrap();
    input.write_all(b"all of it").await.unwrap();
    bed.agent
        .close_stdin(ctx(), &process(&id, ""))
        .await
        .unwrap();
    let mut text = String::new();
    soon(output.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "all of it");
    assert_eq!(bed.exit_of(&id, "").await.code, 0);
}

#[tokio::test]
async fn a_terminal_with_a_size() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("tty");
    let stdio = Stdio {
        stdin: true,
        stdout: true,
        terminal: true,
        width: 101,
        height: 37,
        ..Default::default()
    };
    let (mut input, output) = (
        bed.stream(&id, "", "stdin").await,
        bed.stream(&id, "", "stdout").await,
    );
    let script = "tty; stty size; read line; echo got $line; stty size; cat; echo end";
    bed.create(&id, &shell(&bed, script), stdio).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    let mut lines = BufReader::new(output).lines();
    let mut next = async || {
        soon(lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(next().await, "/dev/pts/0");
    assert_eq!(next().await, "37 101");
    let resize = ResizePtyRequest {
        process: Some(process(&id, "")).into(),
        width: 80,
        height: 24,
        ..Default::default()
    };
    bed.agent.resize_pty(ctx(), &resize).await.unwrap();
    input.write_all(b"hi\n").await.unwrap();
    assert_eq!(next().await, "hi", "the echo");
    assert_eq!(next().await, "got hi");
    assert_eq!(next().await, "24 80");
    // The end of the input is the terminal's end of file.
    drop(input);
    assert_eq!(next().await, "end");
    assert_eq!(bed.exit_of(&id, "").await.code, 0);
    assert_eq!(
        code(bed.agent.resize_pty(ctx(), &resize).await),
        Code::NOT_FOUND
    );
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn environment_user_workdir_and_hostname() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let request = SetupSandboxRequest {
        environment: [
            ("POD".to_owned(), "p".to_owned()),
            ("OWN".to_owned(), "pod".to_owned()),
        ]
        .into(),
        entropy: vec![7; 300],
        hostname: "guest".into(),
        ..Default::default()
    };
    bed.agent.setup_sandbox(ctx(), &request).await.unwrap();
    bed.agent.setup_sandbox(ctx(), &request).await.unwrap();
    let mut other = request.clone();
    other.hostname = "other".into();
    assert_eq!(
        code(bed.agent.setup_sandbox(ctx(), &other).await),
        Code::FAILED_PRECONDITION
    );

    let mut spec = shell(
        &bed,
        "echo $POD $OWN $HOME; id -u; id -g; id -G; pwd; hostname",
    );
    spec["process"]["env"] = json!(["PATH=/bin", "OWN=own"]);
    spec["process"]["cwd"] = json!("/home/user");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6]});
    let (code, out, err) = bed.run(&unique("env"), &spec).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "p own /home/user\n1000\n1001\n1001 5 6\n/home/user\ninside\n"
    );
}

#[tokio::test]
async fn exec_in_a_running_container() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("exec");
    bed.create(&id, &shell(&bed, "sleep 1000"), Stdio::default())
        .await
        .unwrap();
    assert_eq!(
        code(bed.add_exec(&id, "early", json!(["true"]), outputs()).await),
        Code::FAILED_PRECONDITION
    );
    bed.start_process(&id, "").await.unwrap();

    let (mut out, mut err) = (
        bed.stream(&id, "e1", "stdout").await,
        bed.stream(&id, "e1", "stderr").await,
    );
    let script = json!([
        "sh",
        "-c",
        "echo in; echo bad >&2; hostname; [ $$ -gt 1 ] && cat /proc/1/comm; exit 3"
    ]);
    bed.add_exec(&id, "e1", script.clone(), outputs())
        .await
        .unwrap();
    assert_eq!(
        code(bed.add_exec(&id, "e1", script, outputs()).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(bed.signal(&id, "e1", 15, false).await),
        Code::FAILED_PRECONDITION
    );
    let pid = bed.start_process(&id, "e1").await.unwrap();
    assert!(pid > 0);
    let (mut stdout, mut stderr) = (String::new(), String::new());
    soon(out.read_to_string(&mut stdout)).await.unwrap();
    soon(err.read_to_string(&mut stderr)).await.unwrap();
    assert_eq!(
        (stdout.as_str(), stderr.as_str()),
        ("in\ninside\nsleep\n", "bad\n")
    );
    assert_eq!(bed.exit_of(&id, "e1").await.code, 3);
    assert_eq!(bed.delete(&id, "e1").await.unwrap().code, 3);
    assert_eq!(code(bed.delete(&id, "e1").await), Code::NOT_FOUND);

    // A terminal for an exec.
    let stdio = Stdio {
        stdout: true,
        terminal: true,
        width: 90,
        height: 30,
        ..Default::default()
    };
    bed.add_exec(&id, "e2", json!(["sh", "-c", "tty; exit 0"]), stdio)
        .await
        .unwrap();
    let mut out = bed.stream(&id, "e2", "stdout").await;
    bed.start_process(&id, "e2").await.unwrap();
    let mut text = String::new();
    soon(out.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "/dev/pts/0\r\n");
    assert_eq!(bed.exit_of(&id, "e2").await.code, 0);

    // A background grandchild with the output open does not hold the exit back.
    bed.add_exec(
        &id,
        "e3",
        json!(["sh", "-c", "sleep 999 & echo started"]),
        outputs(),
    )
    .await
    .unwrap();
    let (mut out, _err) = (
        bed.stream(&id, "e3", "stdout").await,
        bed.stream(&id, "e3", "stderr").await,
    );
    bed.start_process(&id, "e3").await.unwrap();
    assert_eq!(bed.exit_of(&id, "e3").await.code, 0);
    let mut text = String::new();
    soon(out.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "started\n");

    assert_eq!(code(bed.delete(&id, "").await), Code::FAILED_PRECONDITION);
    bed.signal(&id, "", 9, false).await.unwrap();
    assert_eq!(bed.exit_of(&id, "").await.code, 137);
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn signals() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("sig");
    let script = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let mut out = BufReader::new(bed.stream(&id, "", "stdout").await);
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    bed.create(&id, &shell(&bed, script), stdio).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    let mut line = String::new();
    soon(out.read_line(&mut line)).await.unwrap();
    assert_eq!(
        code(bed.signal(&id, "", 0, false).await),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(
        code(bed.signal(&id, "", 65, false).await),
        Code::INVALID_ARGUMENT
    );
    bed.signal(&id, "", 15, false).await.unwrap();
    soon(out.read_to_string(&mut line)).await.unwrap();
    assert_eq!(line, "ready\nterm\n");
    assert_eq!(bed.exit_of(&id, "").await.code, 5);
    assert_eq!(code(bed.signal(&id, "", 15, false).await), Code::NOT_FOUND);
    bed.delete(&id, "").await.unwrap();

    // A real-time signal to an exec, then all at once.
    let forever = spec(&bed, json!(["sleep", "1000"]));
    bed.create(&id, &forever, Stdio::default()).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    for exec in ["rt", "e"] {
        bed.add_exec(&id, exec, json!(["sleep", "1000"]), Stdio::default())
            .await
            .unwrap();
        bed.start_process(&id, exec).await.unwrap();
    }
    bed.signal(&id, "rt", 34, false).await.unwrap();
    assert_eq!(bed.exit_of(&id, "rt").await.code, 162);
    let pids = bed
        .agent
        .list_pids(ctx(), &container(&id))
        .await
        .unwrap()
        .pids;
    assert_eq!(pids.len(), 2, "{pids:?}");
    assert_eq!(
        code(bed.signal(&id, "e", 9, true).await),
        Code::INVALID_ARGUMENT
    );
    bed.signal(&id, "", 9, true).await.unwrap();
    let mut codes = Vec::new();
    for _ in 0..2 {
        let event = soon(bed.events.recv()).await.unwrap().unwrap();
        if let Some(event::Kind::Exit(exit)) = event.kind {
            codes.push((exit.process.exec_id.clone(), exit.status.code));
        }
    }
    codes.sort();
    assert_eq!(codes, [(String::new(), 137), ("e".to_owned(), 137)]);
    bed.delete(&id, "").await.unwrap();
}

fn container(id: &str) -> ContainerRef {
    ContainerRef {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn programs_that_cannot_run() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("bad");
    for (program, expected, exit) in [
        ("nosuch", Code::NOT_FOUND, 127),
        ("/bin/nosuch", Code::NOT_FOUND, 127),
        ("/bin/lost", Code::NOT_FOUND, 127),
        ("locked", Code::PERMISSION_DENIED, 126),
        ("/bin", Code::PERMISSION_DENIED, 126),
        ("noexec", Code::PERMISSION_DENIED, 126),
    ] {
        let (mut out, mut err) = (
            bed.stream(&id, "", "stdout").await,
            bed.stream(&id, "", "stderr").await,
        );
        bed.create(&id, &spec(&bed, json!([program])), outputs())
            .await
            .unwrap();
        let started = bed.start_process(&id, "").await;
        assert!(message(started.clone()).contains(program), "{started:?}");
        assert_eq!(code(started), expected, "{program}");
        let mut text = String::new();
        soon(out.read_to_string(&mut text)).await.unwrap();
        soon(err.read_to_string(&mut text)).await.unwrap();
        assert_eq!(text, "", "the container's streams carry no words of ours");
        assert_eq!(bed.delete(&id, "").await.unwrap().code, exit);
    }
    bed.create(&id, &spec(&bed, json!(["sleep", "1000"])), Stdio::default())
        .await
        .unwrap();
    bed.start_process(&id, "").await.unwrap();
    for (exec, program, expected, exit) in [
        ("a", "nosuch", Code::NOT_FOUND, 127),
        ("b", "locked", Code::PERMISSION_DENIED, 126),
    ] {
        bed.add_exec(&id, exec, json!([program]), outputs())
            .await
            .unwrap();
        let mut out = bed.stream(&id, exec, "stdout").await;
        assert_eq!(code(bed.start_process(&id, exec).await), expected);
        let mut text = String::new();
        soon(out.read_to_string(&mut text)).await.unwrap();
        assert_eq!(text, "");
        assert_eq!(bed.delete(&id, exec).await.unwrap().code, exit);
    }
    bed.signal(&id, "", 9, false).await.unwrap();
    bed.exit_of(&id, "").await;
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn two_containers_at_once() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let (a, b) = (unique("a"), unique("b"));
    let stdio = || Stdio {
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let mut ends = Vec::new();
    for id in [&a, &b] {
        ends.push((
            bed.stream(id, "", "stdin").await,
            bed.stream(id, "", "stdout").await,
        ));
        bed.create(id, &spec(&bed, json!(["cat"])), stdio())
            .await
            .unwrap();
        bed.start_process(id, "").await.unwrap();
    }
    for (i, (input, output)) in ends.iter_mut().enumerate() {
        input
            .write_all(format!("text {i}").as_bytes())
            .await
            .unwrap();
        let mut got = [0; 6];
        soon(output.read_exact(&mut got)).await.unwrap();
        assert_eq!(got, format!("text {i}").as_bytes());
    }
    drop(ends);
    let mut codes = Vec::new();
    for _ in 0..2 {
        if let Some(event::Kind::Exit(exit)) = soon(bed.events.recv()).await.unwrap().unwrap().kind
        {
            codes.push((exit.process.container_id.clone(), exit.status.code));
        }
    }
    codes.sort();
    assert_eq!(codes, [(a.clone(), 0), (b.clone(), 0)]);
    bed.delete(&a, "").await.unwrap();
    bed.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_waiting_container_holds_no_stream_of_another() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let (waiting, id) = (unique("waits"), unique("reads"));
    let stdio = Stdio {
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    bed.create(&id, &spec(&bed, json!(["cat"])), stdio)
        .await
        .unwrap();
    let (input, mut output) = (
        bed.stream(&id, "", "stdin").await,
        bed.stream(&id, "", "stdout").await,
    );
    bed.start_process(&id, "").await.unwrap();
    // Forked from the agent while the other's streams are open, and not started.
    bed.create(&waiting, &spec(&bed, json!(["true"])), Stdio::default())
        .await
        .unwrap();
    drop(input);
    let mut text = String::new();
    soon(output.read_to_string(&mut text)).await.unwrap();
    assert_eq!(bed.exit_of(&id, "").await.code, 0);
    bed.delete(&id, "").await.unwrap();
    bed.delete(&waiting, "").await.unwrap();
}

#[tokio::test]
async fn nothing_stays_behind() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("gone");
    let before = bed.holdings(&id);

    let spec_ok = shell(&bed, "echo x");
    bed.run(&id, &spec_ok).await;
    assert_eq!(bed.holdings(&id), before, "after a whole life");

    bed.create(&id, &spec_ok, outputs()).await.unwrap();
    assert_ne!(bed.holdings(&id), before);
    assert_eq!(bed.delete(&id, "").await.unwrap().code, 137);
    settle(&bed, &id, &before, "never started").await;

    let mut bad = spec_ok.clone();
    bad["root"]["path"] = json!("/nonexistent");
    assert_eq!(code(bed.create(&id, &bad, outputs()).await), Code::INTERNAL);
    settle(&bed, &id, &before, "no root").await;

    let mut bad = spec_ok.clone();
    bad["mounts"][0]["type"] = json!("nosuchfs");
    assert_eq!(code(bed.create(&id, &bad, outputs()).await), Code::INTERNAL);
    settle(&bed, &id, &before, "failed inside").await;

    // An exec's leftovers go with the container, and so do mounts made for it.
    let target = bed.rootfs().join("tmp");
    let request = agent_api::rpc::CreateContainerRequest {
        container_id: id.clone(),
        spec_json: shell(&bed, "sleep 1000").to_string().into_bytes(),
        mounts: vec![Mount {
            target: target.to_string_lossy().into_owned(),
            fstype: "tmpfs".into(),
            options: vec!["size=1m".into()],
            ..Default::default()
        }],
        ..Default::default()
    };
    bed.agent.create_container(ctx(), &request).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    bed.add_exec(&id, "e", json!(["sleep", "1000"]), Stdio::default())
        .await
        .unwrap();
    bed.start_process(&id, "e").await.unwrap();
    bed.signal(&id, "", 9, true).await.unwrap();
    for _ in 0..2 {
        soon(bed.events.recv()).await.unwrap().unwrap();
    }
    bed.delete(&id, "").await.unwrap();
    settle(&bed, &id, &before, "with an exec").await;
}

#[tokio::test]
async fn volumes() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
    std::fs::write(&file, "from outside").unwrap();
    std::fs::create_dir(&folder).unwrap();
    let id = unique("vol");
    let mut spec = shell(
        &bed,
        "cat /etc/motd; echo x > /etc/motd; echo back > /data/new; touch /ro/x; mount | grep -c ' /proc '; \
         cat /deep/er/new; stat -c %a /dev/shm",
    );
    let mut mounts = spec["mounts"].as_array().unwrap().clone();
    let bind = |from: &std::path::Path, to: &str, mode: &str| json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", "rprivate", mode]});
    // A file and folders whose destinations do not exist, read-only and writable.
    mounts.push(bind(&file, "/etc/motd", "ro"));
    mounts.push(bind(&folder, "/data", "rw"));
    mounts.push(bind(&folder, "/ro", "ro"));
    mounts.push(bind(&folder, "/deep/er", "rw"));
    let shm = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=64k"]});
    mounts.push(shm);
    spec["mounts"] = json!(mounts);
    // Where the destination exists, the agent mounts itself.
    std::fs::create_dir(bed.rootfs().join("data")).unwrap();
    let before = bed.holdings(&id);
    let (_, out, err) = bed.run(&id, &spec).await;
    assert_eq!(out, "from outside1\nback\n1777\n");
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
    assert_eq!(
        std::fs::read_to_string(folder.join("new")).unwrap(),
        "back\n"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "from outside");
    settle(&bed, &id, &before, "volumes").await;
    assert!(
        bed.rootfs().join("bin/busybox").exists(),
        "the image is untouched"
    );
}

#[tokio::test]
async fn seccomp_and_privileges() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("sec");
    let script = "mkdir /tmp/a; echo mkdir $?; chroot / true; echo chroot $?; grep -E 'Seccomp:|NoNewPrivs|CapBnd' /proc/self/status";
    let mut spec = shell(&bed, script);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_NATIVE"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    });
    for (nnp, shown) in [(false, "0"), (true, "1")] {
        spec["process"]["noNewPrivileges"] = json!(nnp);
        let (_, out, err) = bed.run(&id, &spec).await;
        assert!(err.contains("Function not implemented"), "{err}");
        let words: Vec<&str> = out.split_whitespace().collect();
        let expected = [
            "mkdir",
            "1",
            "chroot",
            "0",
            "CapBnd:",
            "0000000000040020",
            "NoNewPrivs:",
            shown,
            "Seccomp:",
            "2",
        ];
        assert_eq!(words, expected);
    }
    // Without CAP_SYS_CHROOT and for an exec as well.
    spec["process"]["args"] = json!(["sleep", "1000"]);
    bed.create(&id, &spec, Stdio::default()).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    bed.add_exec(&id, "e", json!(["mkdir", "/tmp/b"]), outputs())
        .await
        .unwrap();
    let (_out, mut err) = (
        bed.stream(&id, "e", "stdout").await,
        bed.stream(&id, "e", "stderr").await,
    );
    bed.start_process(&id, "e").await.unwrap();
    let mut text = String::new();
    soon(err.read_to_string(&mut text)).await.unwrap();
    assert!(text.contains("Function not implemented"), "{text}");
    assert_eq!(bed.exit_of(&id, "e").await.code, 1);
    bed.signal(&id, "", 9, false).await.unwrap();
    bed.exit_of(&id, "").await;
    bed.delete(&id, "").await.unwrap();
}

/// Waits for killed children to be reaped, then compares.
async fn settle(bed: &Bed, id: &str, before: &[String], what: &str) {
    let mut now = bed.holdings(id);
    for _ in 0..100 {
        if now == before {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        now = bed.holdings(id);
    }
    assert_eq!(now, before, "{what}");
}

#[tokio::test]
async fn wrong_requests_get_typed_errors() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("wrong");
    let good = shell(&bed, "sleep 1000");
    for bad_id in ["", "..", "a/b", "a b"] {
        assert_eq!(
            code(bed.create(bad_id, &good, outputs()).await),
            Code::INVALID_ARGUMENT
        );
        assert_eq!(code(bed.delete(bad_id, "").await), Code::INVALID_ARGUMENT);
    }
    assert_eq!(code(bed.start_process(&id, "").await), Code::NOT_FOUND);
    assert_eq!(code(bed.delete(&id, "").await), Code::NOT_FOUND);
    assert_eq!(
        code(bed.agent.stats(ctx(), &container(&id)).await),
        Code::NOT_FOUND
    );
    assert_eq!(
        code(bed.create(&id, &json!({"root": 5}), outputs()).await),
        Code::INVALID_ARGUMENT
    );
    let mut ns = good.clone();
    ns["linux"]["namespaces"][0] = json!({"type": "ipc", "path": "/run/sandbox-ns/ipc"});
    let refused = bed.create(&id, &ns, outputs()).await;
    assert!(
        message(refused.clone()).contains("/run/sandbox-ns/ipc"),
        "{refused:?}"
    );
    assert_eq!(code(refused), Code::INVALID_ARGUMENT);

    bed.create(&id, &good, Stdio::default()).await.unwrap();
    assert_eq!(
        code(bed.create(&id, &good, Stdio::default()).await),
        Code::ALREADY_EXISTS
    );
    bed.start_process(&id, "").await.unwrap();
    assert_eq!(
        code(bed.start_process(&id, "").await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        code(bed.start_process(&id, "nosuch").await),
        Code::NOT_FOUND
    );
    assert_eq!(code(bed.delete(&id, "").await), Code::FAILED_PRECONDITION);
    let request = EventsRequest {
        protocol_version: 999,
        ..Default::default()
    };
    let mut refused = bed.agent.events(ctx(), &request).await.unwrap();
    assert_eq!(code(refused.recv().await), Code::FAILED_PRECONDITION);

    // Streams nobody may open change nothing.
    for header in ["", "../x//stdin", "a//stdio"] {
        let mut s = bed.stream(header, "", "stdout").await;
        let mut rest = Vec::new();
        soon(s.read_to_end(&mut rest)).await.unwrap();
    }
    bed.signal(&id, "", 9, false).await.unwrap();
    assert_eq!(bed.exit_of(&id, "").await.code, 137);
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn pause_stats_and_limits() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("limits");
    let mut limited = shell(&bed, "while :; do :; done");
    if bed.has_controllers() {
        limited["linux"]["resources"] =
            json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}});
    }
    bed.create(&id, &limited, Stdio::default()).await.unwrap();
    bed.start_process(&id, "").await.unwrap();
    bed.agent
        .pause_container(ctx(), &container(&id))
        .await
        .unwrap();
    assert_eq!(
        code(
            async {
                bed.add_exec(&id, "e", json!(["true"]), Stdio::default())
                    .await
                    .unwrap();
                bed.start_process(&id, "e").await
            }
            .await
        ),
        Code::FAILED_PRECONDITION
    );
    bed.agent
        .resume_container(ctx(), &container(&id))
        .await
        .unwrap();
    bed.start_process(&id, "e").await.unwrap();
    bed.exit_of(&id, "e").await;
    if bed.has_controllers() {
        let stats = bed.agent.stats(ctx(), &container(&id)).await.unwrap();
        assert_eq!((stats.memory_limit_bytes, stats.pids_limit), (64 << 20, 50));
        assert!(stats.cpu_usage_us > 0 && stats.memory_usage_bytes > 0);
        let update = UpdateContainerRequest {
            container_id: id.clone(),
            resources_json: json!({"memory": {"limit": 32 << 20}})
                .to_string()
                .into_bytes(),
            ..Default::default()
        };
        bed.agent.update_container(ctx(), &update).await.unwrap();
        let stats = bed.agent.stats(ctx(), &container(&id)).await.unwrap();
        assert_eq!(stats.memory_limit_bytes, 32 << 20);
    }
    bed.signal(&id, "", 9, true).await.unwrap();
    assert_eq!(bed.exit_of(&id, "").await.code, 137);
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn a_new_connection_hears_of_old_exits() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    let id = unique("again");
    assert!(
        bed.ready.cpus > 0
            && bed.ready.memory_bytes > 0
            && bed.ready.ready_at_us >= bed.ready.init_at_us
    );
    bed.create(&id, &shell(&bed, "exit 4"), Stdio::default())
        .await
        .unwrap();
    bed.start_process(&id, "").await.unwrap();
    assert_eq!(bed.exit_of(&id, "").await.code, 4);
    bed.reconnect().await;
    assert_eq!(bed.exit_of(&id, "").await.code, 4);
    bed.delete(&id, "").await.unwrap();
}

#[tokio::test]
async fn the_container_cannot_climb_out() {
    let Some(mut bed) = Bed::start().await else {
        return;
    };
    // Root with CAP_SYS_CHROOT: the classic walk up from below a second chroot.
    let script = "cd ..; cd ../../..; ls -d /work /home/user 2>/dev/null; \
                  mkdir -p /tmp/jail/bin; cp /bin/busybox /tmp/jail/bin/; ls /proc/1/root/bin/busybox";
    let spec = shell(&bed, script);
    let (_, out, _) = bed.run(&unique("jail"), &spec).await;
    assert_eq!(out, "/home/user\n/proc/1/root/bin/busybox\n");
}

#[tokio::test]
async fn shutdown_is_answered_first() {
    let Some(bed) = Bed::start().await else {
        return;
    };
    bed.agent
        .shutdown(ctx(), &agent_api::rpc::Empty::default())
        .await
        .unwrap();
}
