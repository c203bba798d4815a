//! Containers and processes over the Task API.

use tokio::io::AsyncWriteExt;

use super::*;
use crate::testing::patient;

#[tokio::test]
async fn a_container_runs_from_create_to_delete() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let stdout = daemon.fifo("stdout");
    let output = reader(&stdout);
    let mut request = daemon.container("c1", &["echo", "hello"]);
    request.stdout = stdout.display().to_string();

    assert!(tasks.create(context(), &request).await.unwrap().pid > 0);
    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::CREATED);
    let rootfs = daemon.pods_dir().join("p1/shared/c1/rootfs");
    assert!(
        mount_points_below(&daemon.pods_dir())
            .unwrap()
            .contains(&rootfs)
    );
    assert!(start_task(&tasks, "c1", "").await.unwrap() > 0);
    assert_eq!(wait_task(&tasks, "c1", "").await, 0);
    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::STOPPED);
    // The fifo ends with the process, before anything is deleted.
    assert_eq!(read_all(output).await, "hello\n");
    assert_eq!(delete_task(&tasks, "c1", "").await.unwrap(), 0);
    assert!(!daemon.pods_dir().join("p1/shared/c1").exists());
    let gone = tasks
        .state(context(), &process("c1", ""))
        .await
        .unwrap_err();
    assert_eq!(ttrpc_code(&gone), ttrpc::Code::NOT_FOUND);

    daemon.shutdown_pod("p1").await.unwrap();
    daemon.assert_clean();
}

#[tokio::test]
async fn the_guest_gets_its_own_paths_and_the_pods_files() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let request = daemon.container("c1", &["sleep"]);
    tasks.create(context(), &request).await.unwrap();
    let machine = daemon.backend.machine("p1");
    let spec = machine.agent().specs.lock().unwrap()["c1"].clone();
    assert_eq!(spec["root"]["path"], "/run/kuasar/state/c1/rootfs");
    let files: Vec<_> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["source"])
        .collect();
    assert_eq!(
        files,
        [
            "/run/kuasar/state/etc/hosts",
            "/run/kuasar/state/etc/hostname",
            "/run/kuasar/state/etc/resolv.conf"
        ]
    );
    let setup = machine.agent().setup.lock().unwrap().clone().unwrap();
    assert_eq!(setup.hostname, "p1");
    assert_eq!(setup.mounts[0].source, "kuasar");
    assert_eq!(setup.environment["FAKE"], "1");
    assert_eq!(setup.entropy.len(), 64);
}

#[tokio::test]
async fn stdin_reaches_the_process_and_ends_with_close_io() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let (stdin, stdout) = (daemon.fifo("stdin"), daemon.fifo("stdout"));
    let output = reader(&stdout);
    let mut request = daemon.container("c1", &["cat"]);
    request.stdin = stdin.display().to_string();
    request.stdout = stdout.display().to_string();
    tasks.create(context(), &request).await.unwrap();
    start_task(&tasks, "c1", "").await.unwrap();
    let mut input = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    input.write_all(b"through the guest").await.unwrap();
    drop(input);
    let close = api::CloseIORequest {
        id: "c1".to_owned(),
        stdin: true,
        ..Default::default()
    };
    tasks.close_io(context(), &close).await.unwrap();
    assert_eq!(wait_task(&tasks, "c1", "").await, 0);
    assert_eq!(read_all(output).await, "through the guest");
}

#[tokio::test]
async fn execs_come_and_go_in_a_running_container() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let request = daemon.container("c1", &["sleep"]);
    tasks.create(context(), &request).await.unwrap();
    let early = tasks
        .exec(context(), &exec("c1", "e0", &["exit", "1"]))
        .await;
    assert_eq!(
        ttrpc_code(&early.unwrap_err()),
        ttrpc::Code::FAILED_PRECONDITION
    );
    start_task(&tasks, "c1", "").await.unwrap();

    let request = exec("c1", "e1", &["exit", "3"]);
    tasks.exec(context(), &request).await.unwrap();
    let again = tasks.exec(context(), &request).await.unwrap_err();
    assert_eq!(ttrpc_code(&again), ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(state_of(&tasks, "c1", "e1").await, api::Status::CREATED);
    let (code, pid) = tokio::join!(
        wait_task(&tasks, "c1", "e1"),
        start_task(&tasks, "c1", "e1")
    );
    assert_eq!(code, 3);
    assert!(pid.unwrap() > 0);
    assert_eq!(state_of(&tasks, "c1", "e1").await, api::Status::STOPPED);
    let dead = kill_task(&tasks, "c1", "e1", 9).await.unwrap_err();
    assert_eq!(ttrpc_code(&dead), ttrpc::Code::NOT_FOUND);
    assert_eq!(delete_task(&tasks, "c1", "e1").await.unwrap(), 3);

    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::RUNNING);
    kill_task(&tasks, "c1", "", 0).await.unwrap();
    let busy = delete_task(&tasks, "c1", "").await.unwrap_err();
    assert_eq!(ttrpc_code(&busy), ttrpc::Code::FAILED_PRECONDITION);
    kill_task(&tasks, "c1", "", 15).await.unwrap();
    assert_eq!(wait_task(&tasks, "c1", "").await, 128 + 15);
    let dead = kill_task(&tasks, "c1", "", 0).await.unwrap_err();
    assert_eq!(ttrpc_code(&dead), ttrpc::Code::NOT_FOUND);
}

#[tokio::test]
async fn programs_that_cannot_be_started_say_why() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    for (id, program, code, text) in [
        (
            "c1",
            "missing",
            ttrpc::Code::NOT_FOUND,
            "no such file or directory",
        ),
        (
            "c2",
            "denied",
            ttrpc::Code::PERMISSION_DENIED,
            "permission denied",
        ),
    ] {
        let request = daemon.container(id, &[program]);
        tasks.create(context(), &request).await.unwrap();
        let error = start_task(&tasks, id, "").await.unwrap_err();
        assert_eq!(ttrpc_code(&error), code);
        assert!(error.to_string().contains(text), "{error}");
        delete_task(&tasks, id, "").await.unwrap();
    }
}

#[tokio::test]
async fn both_versions_of_the_task_api_are_served() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    daemon.ready_pod("p1").await;
    let socket = daemon.pods_dir().join("p1/task.sock");
    let client = ttrpc::asynchronous::Client::connect(&format!("unix://{}", socket.display()))
        .await
        .unwrap();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        // containerd 1.7 connects before it creates.
        let request = api::ConnectRequest {
            id: "unknown".to_owned(),
            ..Default::default()
        };
        let mut call = ttrpc::proto::Request::new();
        call.set_service(service.to_owned());
        call.set_method("Connect".to_owned());
        call.set_payload(ttrpc::proto::Codec::encode(&request).unwrap());
        let reply = client.request(call).await.unwrap();
        let reply: api::ConnectResponse = ttrpc::proto::Codec::decode(&reply.payload).unwrap();
        assert_eq!(reply.task_pid, 0);
        assert_eq!(reply.shim_pid, std::process::id());
    }
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn what_callers_rely_on_is_answered() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let request = daemon.container("c1", &["sleep"]);
    let pid = tasks.create(context(), &request).await.unwrap().pid;
    start_task(&tasks, "c1", "").await.unwrap();
    let id = || "c1".to_owned();

    let pids = api::PidsRequest {
        id: id(),
        ..Default::default()
    };
    let pids = tasks.pids(context(), &pids).await.unwrap().processes;
    assert_eq!(pids[0].pid, pid, "never empty: callers index it");
    let stats = api::StatsRequest {
        id: id(),
        ..Default::default()
    };
    // Only containerd says in which namespace it calls; iSulad reads figures of version 1.
    let plain = tasks.stats(context(), &stats).await.unwrap();
    assert_eq!(plain.stats.type_url, "io.containerd.cgroups.v1.Metrics");
    let mut containerd = context();
    containerd.add("containerd-namespace-ttrpc".to_owned(), "k8s.io".to_owned());
    let stats = tasks
        .stats(containerd, &stats)
        .await
        .unwrap()
        .stats
        .unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let pause = api::PauseRequest {
        id: id(),
        ..Default::default()
    };
    tasks.pause(context(), &pause).await.unwrap();
    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::PAUSED);
    let resume = api::ResumeRequest {
        id: id(),
        ..Default::default()
    };
    tasks.resume(context(), &resume).await.unwrap();
    let shutdown = api::ShutdownRequest {
        id: id(),
        ..Default::default()
    };
    tasks.shutdown(context(), &shutdown).await.unwrap();
    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::RUNNING);
    let checkpoint = api::CheckpointTaskRequest {
        id: id(),
        ..Default::default()
    };
    let error = tasks.checkpoint(context(), &checkpoint).await.unwrap_err();
    assert_eq!(ttrpc_code(&error), ttrpc::Code::UNIMPLEMENTED);
    let resize = api::ResizePtyRequest {
        id: id(),
        ..Default::default()
    };
    let error = tasks.resize_pty(context(), &resize).await.unwrap_err();
    assert_eq!(ttrpc_code(&error), ttrpc::Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn isulad_announces_its_tasks_through_update() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let rootfs = daemon.root.path().join("merged");
    std::fs::create_dir(&rootfs).unwrap();
    std::fs::write(rootfs.join("hello"), "").unwrap();
    let list = json!({"tasks": [{
        "task_id": "c1",
        "spec": {"process": {"args": ["sleep"]}},
        "rootfs": [{"type": "bind", "source": rootfs}],
        "processes": [],
    }]});
    let update = |fields: &[&str], list: &serde_json::Value| {
        let extension = prost_types::Any {
            type_url: "github.com/containerd/containerd/Tasks".to_owned(),
            value: list.to_string().into_bytes(),
        };
        rpc::ControllerUpdateRequest {
            sandbox_id: "p1".to_owned(),
            sandbox: Some(crate::rpc::types::Sandbox {
                extensions: [("tasks".to_owned(), extension)].into(),
                ..Default::default()
            }),
            fields: fields.iter().map(|&f| f.to_owned()).collect(),
            ..Default::default()
        }
    };
    let mut client = daemon.client().await;
    client
        .update(update(&["extensions.tasks"], &list))
        .await
        .unwrap();
    let request = api::CreateTaskRequest {
        id: "c1".to_owned(),
        bundle: "/nonexistent".to_owned(),
        ..Default::default()
    };
    tasks.create(context(), &request).await.unwrap();
    assert!(daemon.pods_dir().join("p1/shared/c1/rootfs/hello").exists());

    let unknown = client.update(update(&["labels"], &list)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::Unimplemented);
    let wrong = client
        .update(update(&["extensions.tasks"], &json!({"tasks": 1})))
        .await
        .unwrap_err();
    assert_eq!(wrong.code(), tonic::Code::InvalidArgument);
}
