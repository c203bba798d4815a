//! Containers: states, processes, ends.

use std::fs;
use std::time::{Duration, Instant};

use harness::cri::v1;
use harness::kubelet::bind;

use crate::{Outcome, Suite};

pub(super) fn states(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let pod = suite.pod();
    let config = suite.container("states", "exit 0");
    let id = pod.create_of(config.clone());
    let status = kubelet.status(&id);
    assert_eq!(status.state(), v1::ContainerState::ContainerCreated);
    kubelet.remove_container(&id);
    let mut config = config;
    config.command = ["/bin/sleep", "1000"].map(str::to_owned).into();
    let id = pod.run_of(config);
    let status = kubelet.status(&id);
    assert_eq!(status.state(), v1::ContainerState::ContainerRunning);
    kubelet.stop_container(&id, 0);
    let status = kubelet.exited(&id);
    assert_eq!(status.exit_code, 137);
    kubelet.remove_container(&id);
    kubelet.remove_container(&id);
    let listed = v1::ListContainersRequest::default();
    let listed = kubelet.cri.list_containers(listed).unwrap().containers;
    assert!(listed.iter().all(|container| container.id != id));
    Ok(())
}

pub(super) fn exec_sync(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    let (stdout, stderr, code) = kubelet.exec(&shell, "echo out; echo err >&2; exit 9");
    let found = (stdout.as_str(), stderr.as_str(), code);
    assert_eq!(found, ("out\n", "err\n", 9));
    let begun = Instant::now();
    let late = kubelet.try_exec(&shell, "exec sleep 4321", 5);
    assert!(begun.elapsed() >= Duration::from_secs(5));
    late.unwrap_err();
    let left = kubelet.output(&shell, "ps -o args | grep -c '[s]leep 4321' || true");
    assert_eq!(left, "0\n", "the process is gone");
    Ok(())
}

pub(super) fn stop(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let pod = suite.pod();
    let polite = suite.container(
        "polite",
        "trap 'echo TERM; exit 3' TERM; echo up; while :; do sleep 1; done",
    );
    let name = polite.metadata.clone().unwrap().name;
    let id = pod.run_of(polite);
    kubelet.await_log(&name, "up");
    kubelet.stop_container(&id, 60);
    assert_eq!(kubelet.exited(&id).exit_code, 3);
    kubelet.remove_container(&id);

    // 34 is SIGRTMIN as the C library counts.
    let deaf = suite.container(
        "deaf",
        "trap '' TERM; trap 'echo got RTMIN' 34; echo up; while :; do sleep 1; done",
    );
    let name = deaf.metadata.clone().unwrap().name;
    let id = pod.run_of(deaf);
    kubelet.await_log(&name, "up");
    if suite
        .with_node(|node| {
            node.containerd
                .ctr(&["tasks", "kill", "--signal", "34", &id])
        })
        .is_ok()
    {
        kubelet.await_log(&name, "got RTMIN");
    }
    let begun = Instant::now();
    kubelet.stop_container(&id, 2);
    assert!(begun.elapsed() >= Duration::from_secs(2));
    assert_eq!(kubelet.exited(&id).exit_code, 137);
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn exit_codes(suite: &Suite) -> Outcome {
    let pod = suite.pod();
    // containerd takes the time of the start once it is over: a program should not be quicker.
    let (ended, _) = pod.finish(suite.container("code", "sleep 1; exit 42"));
    assert_eq!((ended.exit_code, ended.reason.as_str()), (42, "Error"));
    assert!(ended.created_at > 0 && ended.started_at >= ended.created_at);
    assert!(ended.finished_at >= ended.started_at);
    let (ended, _) = pod.finish(suite.container("signal", "kill -SEGV $$"));
    // The init of a PID namespace is not killed by its own signals; in the pod's it is.
    assert!([139, 0].contains(&ended.exit_code), "{ended:?}");
    let (ended, _) = pod.finish(suite.container("well", "true"));
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
    Ok(())
}

pub(super) fn process(suite: &Suite) -> Outcome {
    let mut config = suite.container("process", "");
    config.command = vec!["/bin/sh".to_owned()];
    config.args = ["-c", "pwd; echo $GIVEN $0 $1; echo $PATH", "zero", "one"]
        .map(str::to_owned)
        .into();
    config.working_dir = "/tmp".to_owned();
    let printed = suite.output_of(config);
    assert!(printed.starts_with("/tmp\ntoo zero one\n/"), "{printed}");
    Ok(())
}

pub(super) fn odds_and_ends(suite: &Suite) -> Outcome {
    let note = suite.folder().join("termination-log");
    fs::write(&note, "").unwrap();
    let mut config = suite.container(
        "odds",
        "cat /proc/self/oom_score_adj; ulimit -n; echo why it ended > /dev/termination-log",
    );
    let linux = config.linux.get_or_insert_default();
    linux.resources = Some(v1::LinuxContainerResources {
        oom_score_adj: 321,
        ..Default::default()
    });
    config.mounts.push(bind(&note, "/dev/termination-log"));
    let printed = suite.output_of(config);
    let (score, files) = printed.trim().split_once('\n').unwrap();
    assert_eq!(score, "321");
    assert!(files.parse::<u64>().unwrap() >= 1024, "{files} open files");
    assert_eq!(fs::read_to_string(&note).unwrap(), "why it ended\n");
    Ok(())
}

pub(super) fn probes(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    // What a probe of type exec, a postStart and a preStop hook come to.
    for (script, expected) in [("test -d /proc", 0), ("test -d /nowhere", 1)] {
        let (_, _, code) = kubelet.exec(&shell, script);
        assert_eq!(code, expected, "{script}");
    }
    let missing = kubelet.cri.exec_sync(v1::ExecSyncRequest {
        container_id: shell,
        cmd: vec!["/no/such/program".to_owned()],
        timeout: 60,
    });
    let why = missing.unwrap_err();
    assert!(why.message().contains("/no/such/program"), "{why}");
    Ok(())
}

pub(super) fn restart(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let with_folder = |of: &str, script: &str| {
        let mut config = suite.container(of, script);
        config.mounts.push(bind(&folder, "/work"));
        config
    };
    suite.output_of(with_folder("init", "echo prepared > /work/state"));
    let mut main = with_folder("main", "cat /work/state; echo ran > /work/state; exit 1");
    for (attempt, expected) in [(0, "prepared\n"), (1, "ran\n")] {
        main.metadata.get_or_insert_default().attempt = attempt;
        let (ended, log) = suite.pod().finish(main.clone());
        assert_eq!(ended.exit_code, 1, "{log}");
        assert_eq!(crate::suite::lines_of(&log, "stdout"), expected);
    }
    Ok(())
}
