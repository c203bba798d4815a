//! Exec, attach and logs.

use std::fs;

use harness::cri::v1;
use harness::eventually;
use harness::kubelet::{Kubelet, SOON};
use harness::streaming::{RESIZE, STDIN, STDOUT, Session};

use crate::{Mode, Outcome, Suite, skip};

/// Bytes of input that do not fit any buffer on the way.
const MUCH: usize = 1 << 20;

fn url_of_exec(kubelet: &Kubelet, container: &str, script: &str, tty: bool) -> String {
    let request = v1::ExecRequest {
        container_id: container.to_owned(),
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    kubelet.cri.exec(request).unwrap().url
}

pub(super) fn exec(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    // A terminal: its size, input, ctrl-C.
    // The size may come later than the line: they have different ways.
    let script = "trap 'echo interrupted; exit 7' INT; read -r line; echo got $line; \
                  until stty size | grep '31 97'; do sleep 1; done; while :; do sleep 1; done";
    let url = url_of_exec(kubelet, &shell, script, true);
    let mut session = suite.session(&url);
    session.send(RESIZE, br#"{"Width":97,"Height":31}"#);
    session.send(STDIN, b"hello\n");
    let shown = session.expect(STDOUT, "31 97");
    assert!(shown.contains("got hello"), "{shown}");
    session.send(STDIN, &[3]);
    session.expect(STDOUT, "interrupted");
    let (_, _, status) = session.finish();
    assert!(status.contains('7'), "{status}");

    // None: much input, and both outputs apart.
    let script = format!("head -c {MUCH} | wc -c; echo apart >&2; exit 5");
    let url = url_of_exec(kubelet, &shell, &script, false);
    let mut session = suite.session(&url);
    let chunk = vec![b'x'; 16 << 10];
    for _ in 0..MUCH / chunk.len() {
        session.send(STDIN, &chunk);
    }
    let (stdout, stderr, status) = session.finish();
    assert_eq!(stdout.trim(), MUCH.to_string());
    assert_eq!(stderr, "apart\n");
    assert!(status.contains('5'), "{status}");
    Ok(())
}

fn attach_to<'a>(suite: &'a Suite, id: &'a str) -> impl Fn() -> Session + use<'a> {
    move || {
        let request = v1::AttachRequest {
            container_id: id.to_owned(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        suite.session(&suite.kubelet.cri.attach(request).unwrap().url)
    }
}

pub(super) fn attach(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let script = "echo ready; while read -r line; do echo got $line; done; echo end of input";
    let start = |stdin_once| {
        let mut config = suite.container("attached", script);
        let name = config.metadata.clone().unwrap().name;
        (config.stdin, config.stdin_once) = (true, stdin_once);
        let id = suite.pod().run_of(config);
        kubelet.await_log(&name, "ready");
        (id, name)
    };
    // One session after the other.
    let (id, _) = start(false);
    let attach = attach_to(suite, &id);
    for text in ["one", "two"] {
        let mut session = attach();
        session.send(STDIN, format!("{text}\n").as_bytes());
        session.expect(STDOUT, &format!("got {text}"));
    }
    kubelet.stop_container(&id, 0);
    kubelet.remove_container(&id);
    // With stdin_once the container's stdin ends with the first session that had it.
    let (id, name) = start(true);
    let mut session = attach_to(suite, &id)();
    session.send(STDIN, b"only\n");
    session.expect(STDOUT, "got only");
    drop(session);
    assert_eq!(kubelet.exited(&id).exit_code, 0);
    kubelet.await_log(&name, "end of input");
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn logs(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let config = suite.container(
        "logs",
        "echo first; echo second >&2; head -c 20000 /dev/zero | tr '\\0' x; echo; printf no-end; \
         echo .; while :; do echo tick; sleep 1; done",
    );
    let name = config.metadata.clone().unwrap().name;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "tick");
    let log = kubelet.log(&name);
    assert!(log.contains(" stdout F first\n"), "{log}");
    assert!(log.contains(" stderr F second\n"), "{log}");
    assert!(log.contains(" stdout P x"), "a long line comes in parts");
    assert!(log.contains(" stdout F no-end.\n"), "{log}");
    // The kubelet rotates: it renames the file and asks for a new one.
    let rotated = kubelet.logs.join("rotated");
    fs::rename(kubelet.log_path(&name), &rotated).unwrap();
    let request = v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    kubelet.cri.reopen_container_log(request).unwrap();
    kubelet.await_log(&name, "tick");
    kubelet.stop_container(&id, 0);
    kubelet.remove_container(&id);
    Ok(())
}

/// The handler beside the one under test uses the other kind.
pub(super) fn io_types(suite: &Suite) -> Outcome {
    if suite.mode.is_none() {
        return skip("needs a containerd of its own with two handlers");
    }
    if suite.mode == Some(Mode::Shim17) {
        return skip("containerd 1.7 has fifos only");
    }
    let kubelet = Kubelet {
        cri: suite.with_node(|node| node.containerd.cri())?,
        handler: format!("{}-streaming", suite.kubelet.handler),
        image: suite.kubelet.image.clone(),
        logs: suite.kubelet.logs.clone(),
    };
    let pod = kubelet.run_pod("streaming");
    let id = pod.run("streamed", "seq 1 2000; echo err >&2; sleep 1000");
    let log = eventually("the output", SOON, || {
        let log = kubelet.log("streamed");
        (log.lines().count() == 2001).then_some(log)
    });
    assert!(log.contains(" stdout F 2000\n") && log.contains(" stderr F err\n"));
    let (stdout, _, code) = kubelet.exec(&id, "echo exec; exit 4");
    assert_eq!((stdout.as_str(), code), ("exec\n", 4));
    kubelet.remove_pod(&pod.id);
    Ok(())
}
