//! Pods from create to shutdown over the Controller.

use prost::Message;

use super::*;
use crate::rpc::cri::PodSandboxConfig;
use crate::testing::patient;

#[tokio::test]
async fn a_pod_lives_and_ends() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    daemon.create("p1").await.unwrap();
    assert_eq!(daemon.status("p1").await.unwrap().state, "SANDBOX_NOTREADY");
    let again = daemon.create("p1").await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists);

    let started = daemon.start_pod("p1").await.unwrap();
    assert_eq!(started.sandbox_id, "p1");
    assert_eq!(started.pid, std::process::id());
    assert!(started.created_at.unwrap().seconds > 1_700_000_000);
    let socket = daemon.pods_dir().join("p1/task.sock");
    assert_eq!(
        started.address,
        format!("ttrpc+unix://{}", socket.display())
    );
    assert_eq!(started.version, 3, "below 3 containerd looks for a shim");
    let again = daemon.start_pod("p1").await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::FailedPrecondition);

    let status = daemon.status("p1").await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY");
    assert_eq!(status.sandbox_id, "p1");
    assert_eq!((status.address, status.version), (started.address, 3));
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert_eq!(info["vm"]["memory_bytes"], 128 << 20);
    let metrics = rpc::ControllerMetricsRequest {
        sandbox_id: "p1".to_owned(),
        ..Default::default()
    };
    let metrics = daemon.client().await.metrics(metrics).await.unwrap();
    assert_eq!(metrics.into_inner().metrics.unwrap().id, "p1");

    let (waited, also_waited, stopped) =
        tokio::join!(daemon.wait("p1"), daemon.wait("p1"), daemon.stop("p1"));
    stopped.unwrap();
    assert_eq!((waited.unwrap(), also_waited.unwrap()), (0, 0));
    assert_eq!(daemon.wait("p1").await.unwrap(), 0, "at once once it ended");
    let status = daemon.status("p1").await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(status.exited_at.is_some());
    daemon.stop("p1").await.unwrap();
    daemon.shutdown_pod("p1").await.unwrap();
    daemon.shutdown_pod("p1").await.unwrap();
    let gone = daemon.status("p1").await.unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound);
    daemon.assert_clean();
}

#[tokio::test]
async fn unknown_ids_get_the_answers_that_callers_need() {
    let daemon = Daemon::start(Fault::None, patient()).await;
    daemon.stop("x").await.unwrap();
    daemon.shutdown_pod("x").await.unwrap();
    for error in [
        daemon.wait("x").await.unwrap_err(),
        daemon.status("x").await.unwrap_err(),
        daemon.start_pod("x").await.unwrap_err(),
    ] {
        assert_eq!(error.code(), tonic::Code::NotFound);
        assert!(error.message().contains('x'), "{error}");
    }
    // iSulad asks this for a sandbox that may be lost until it is answered.
    let platform = rpc::ControllerPlatformRequest {
        sandbox_id: "x".to_owned(),
        ..Default::default()
    };
    let platform = daemon.client().await.platform(platform).await.unwrap();
    let platform = platform.into_inner().platform.unwrap();
    assert_eq!(platform.os, "linux");
    assert!(["amd64", "arm64"].contains(&platform.architecture.as_str()));
}

#[tokio::test]
async fn requests_that_cannot_be_are_refused_by_field() {
    let daemon = Daemon::start(Fault::None, patient()).await;
    let create = |id: &str, type_url: &str, value: Vec<u8>, netns: &str| {
        let request = rpc::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            options: Some(prost_types::Any {
                type_url: type_url.to_owned(),
                value,
            }),
            netns_path: netns.to_owned(),
            ..Default::default()
        };
        let daemon = &daemon;
        async move { daemon.client().await.create(request).await }
    };
    for (id, type_url, value, netns, field) in [
        ("../x", "", vec![], "", "sandbox_id"),
        ("p", "some.Type", vec![], "", "options.type_url"),
        ("p", "", vec![0xff], "", "options.value"),
        ("p", "", vec![], "relative", "netns_path"),
        ("p", "", vec![], "/etc/passwd", "netns_path"),
    ] {
        let error = create(id, type_url, value, netns).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(error.message().starts_with(field), "{error}");
    }
    daemon.assert_clean();
}

#[tokio::test]
async fn limits_and_hostname_come_from_the_pod_configuration() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let config = PodSandboxConfig {
        hostname: "web-1".to_owned(),
        linux: Some(crate::rpc::cri::LinuxPodSandboxConfig {
            resources: Some(crate::rpc::cri::LinuxContainerResources {
                cpu_quota: 150_000,
                cpu_period: 100_000,
                memory_limit_in_bytes: 256 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    for (id, type_url) in [("p1", "runtime.v1.PodSandboxConfig"), ("p2", "")] {
        let request = rpc::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            options: Some(prost_types::Any {
                type_url: type_url.to_owned(),
                value: config.encode_to_vec(),
            }),
            ..Default::default()
        };
        daemon.client().await.create(request).await.unwrap();
        daemon.start_pod(id).await.unwrap();
        let machine = daemon.backend.machine(id);
        assert_eq!(machine.request.vcpus, 2);
        assert_eq!(machine.request.memory_bytes, (256 + 48) << 20);
        let setup = machine.agent().setup.lock().unwrap().clone().unwrap();
        assert_eq!(setup.hostname, "web-1");
    }
}

#[tokio::test]
async fn a_daemon_that_ends_takes_its_pods_along() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let request = daemon.container("c1", &["sleep"]);
    tasks.create(context(), &request).await.unwrap();
    daemon.ready_pod("p2").await;
    let Daemon { server, root, .. } = daemon;
    server.shutdown(SOON).await;
    assert!(!root.path().join("s.sock").exists());
    let left: Vec<_> = std::fs::read_dir(root.path().join("pods"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 1, "the lock file: {left:?}");
    assert_eq!(
        mount_points_below(root.path()).unwrap(),
        Vec::<PathBuf>::new()
    );
}

#[tokio::test]
async fn a_daemon_cleans_up_after_one_that_died() {
    if !can_mount() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let pod = root.path().join("pods/p1");
    std::fs::create_dir_all(pod.join("shared/c1")).unwrap();
    std::fs::write(pod.join("task.sock"), "").unwrap();
    crate::pod::record::Record::new("p1", 1, "", "")
        .write(&pod)
        .unwrap();
    let volume = root.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("data"), "precious").unwrap();
    nix::mount::mount(
        Some(&volume),
        &pod.join("shared/c1"),
        None::<&str>,
        nix::mount::MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let options = ServerOptions {
        listen: root.path().join("s.sock"),
        dir: root.path().join("pods"),
        backend: Some(FakeBackend::new(Fault::None)),
        ..Default::default()
    };
    let server = Server::start(options).await.unwrap();
    assert!(!pod.exists());
    assert_eq!(
        std::fs::read_to_string(volume.join("data")).unwrap(),
        "precious"
    );
    server.shutdown(SOON).await;
}
