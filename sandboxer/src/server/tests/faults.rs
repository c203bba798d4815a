//! What is left, and who notices, when something fails.

use vmm_core::vm::ExitReason;

use super::*;
use crate::testing::{hasty, patient};

#[tokio::test]
async fn a_start_that_fails_leaves_nothing() {
    if !can_mount() {
        return;
    }
    for (fault, code, text) in [
        (Fault::Build, tonic::Code::Unimplemented, "build a VM"),
        (Fault::Start, tonic::Code::Unimplemented, "start a VM"),
        (
            Fault::EarlyExit,
            tonic::Code::FailedPrecondition,
            "triple fault",
        ),
        (
            Fault::OldAgent,
            tonic::Code::FailedPrecondition,
            "rebuild the guest image",
        ),
        (Fault::Setup, tonic::Code::Internal, "no setup today"),
    ] {
        let daemon = Daemon::start(fault, patient()).await;
        daemon.create("p1").await.unwrap();
        let error = daemon.start_pod("p1").await.unwrap_err();
        assert_eq!(error.code(), code, "{fault:?}: {error}");
        assert!(error.message().contains(text), "{fault:?}: {error}");
        // containerd calls nothing after a failed start.
        let gone = daemon.status("p1").await.unwrap_err();
        assert_eq!(gone.code(), tonic::Code::NotFound, "{fault:?}");
        daemon.assert_clean();
        daemon.shutdown_pod("p1").await.unwrap();
        daemon.create("p1").await.unwrap();
    }
}

#[tokio::test]
async fn a_guest_that_stays_silent_is_given_up() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::SilentGuest, hasty()).await;
    daemon.create("p1").await.unwrap();
    let error = daemon.start_pod("p1").await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
    assert!(error.message().contains("boot"), "{error}");
    daemon.assert_clean();
}

#[tokio::test]
async fn a_pod_that_boots_answers_and_can_be_stopped() {
    if !can_mount() {
        return;
    }
    let daemon = Arc::new(Daemon::start(Fault::SilentGuest, patient()).await);
    daemon.create("p1").await.unwrap();
    let starting = {
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move { daemon.start_pod("p1").await })
    };
    // Once the task socket is there the start is under way.
    while !daemon.pods_dir().join("p1/task.sock").exists() {
        tokio::task::yield_now().await;
    }
    let status = tokio::time::timeout(Duration::from_secs(1), daemon.status("p1"));
    assert_eq!(status.await.unwrap().unwrap().state, "SANDBOX_NOTREADY");
    let (stopped, shut_down) = tokio::join!(daemon.stop("p1"), daemon.shutdown_pod("p1"));
    stopped.unwrap();
    shut_down.unwrap();
    let error = starting.await.unwrap().unwrap_err();
    assert_eq!(error.code(), tonic::Code::Aborted, "{error}");
    daemon.assert_clean();
}

#[tokio::test]
async fn a_start_whose_caller_goes_away_is_undone() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::SilentGuest, patient()).await;
    daemon.create("p1").await.unwrap();
    let waiting = daemon.wait("p1");
    let abandoned = async {
        tokio::select! {
            started = daemon.start_pod("p1") => panic!("{started:?}"),
            () = async {
                while !daemon.pods_dir().join("p1/task.sock").exists() {
                    tokio::task::yield_now().await;
                }
            } => {}
        }
    };
    let (ended, ()) = tokio::join!(waiting, abandoned);
    assert_eq!(ended.unwrap(), 255);
    // Waits for the removal that is under way.
    daemon.shutdown_pod("p1").await.unwrap();
    daemon.assert_clean();
}

#[tokio::test]
async fn a_container_that_cannot_be_created_leaves_nothing() {
    if !can_mount() {
        return;
    }
    for fault in [Fault::Create, Fault::Streams] {
        let daemon = Daemon::start(fault, patient()).await;
        let tasks = daemon.ready_pod("p1").await;
        let mut request = daemon.container("c1", &["sleep"]);
        request.stdout = daemon.fifo("stdout").display().to_string();
        tasks.create(context(), &request).await.unwrap_err();
        let gone = tasks
            .state(context(), &process("c1", ""))
            .await
            .unwrap_err();
        assert_eq!(ttrpc_code(&gone), ttrpc::Code::NOT_FOUND);
        assert!(!daemon.pods_dir().join("p1/shared/c1").exists());
        daemon.shutdown_pod("p1").await.unwrap();
        daemon.assert_clean();
    }
}

#[tokio::test]
async fn bundles_that_cannot_be_used_are_refused_with_the_path() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let mut request = daemon.container("c1", &["sleep"]);
    request.bundle = "/nonexistent/bundle".to_owned();
    let error = tasks.create(context(), &request).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("/nonexistent/bundle/config.json"),
        "{error}"
    );
    let mut request = daemon.container("c1", &["sleep"]);
    std::fs::write(Path::new(&request.bundle).join("config.json"), "{").unwrap();
    let error = tasks.create(context(), &request).await.unwrap_err();
    assert_eq!(ttrpc_code(&error), ttrpc::Code::INVALID_ARGUMENT);
    request.id = "../c1".to_owned();
    let error = tasks.create(context(), &request).await.unwrap_err();
    assert_eq!(ttrpc_code(&error), ttrpc::Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_machine_that_dies_ends_its_containers_and_no_other_pod() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let other = daemon.ready_pod("p2").await;
    let stdout = daemon.fifo("stdout");
    let output = reader(&stdout);
    let mut request = daemon.container("c1", &["sleep"]);
    request.stdout = stdout.display().to_string();
    tasks.create(context(), &request).await.unwrap();
    start_task(&tasks, "c1", "").await.unwrap();
    let request = daemon.container("c2", &["exit", "5"]);
    other.create(context(), &request).await.unwrap();

    let machine = daemon.backend.machine("p1");
    let (code, pod_code, ()) =
        tokio::join!(wait_task(&tasks, "c1", ""), daemon.wait("p1"), async {
            machine.end(ExitReason::GuestPanic("sysrq".to_owned()));
        });
    assert_eq!((code, pod_code.unwrap()), (137, 137));
    assert_eq!(read_all(output).await, "");
    let status = daemon.status("p1").await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(status.info["info"].contains("sysrq"), "{:?}", status.info);
    // The task stays for State and Delete, its mounts do not.
    assert_eq!(state_of(&tasks, "c1", "").await, api::Status::STOPPED);
    assert!(!daemon.pods_dir().join("p1/shared/c1").exists());
    assert_eq!(delete_task(&tasks, "c1", "").await.unwrap(), 137);
    let refused = tasks
        .create(context(), &daemon.container("c3", &["sleep"]))
        .await;
    assert_eq!(
        ttrpc_code(&refused.unwrap_err()),
        ttrpc::Code::FAILED_PRECONDITION
    );

    start_task(&other, "c2", "").await.unwrap();
    assert_eq!(wait_task(&other, "c2", "").await, 5);
    daemon.shutdown_pod("p1").await.unwrap();
    daemon.shutdown_pod("p2").await.unwrap();
    daemon.assert_clean();
}

#[tokio::test]
async fn calls_go_on_after_the_agent_dials_again() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    let tasks = daemon.ready_pod("p1").await;
    let request = daemon.container("c1", &["sleep"]);
    tasks.create(context(), &request).await.unwrap();
    start_task(&tasks, "c1", "").await.unwrap();
    daemon.backend.machine("p1").redial().await;
    kill_task(&tasks, "c1", "", 9).await.unwrap();
    assert_eq!(wait_task(&tasks, "c1", "").await, 137);
}

#[tokio::test]
async fn a_guest_that_does_not_power_off_is_ended() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::DeafGuest, hasty()).await;
    daemon.ready_pod("p1").await;
    daemon.stop("p1").await.unwrap();
    assert_eq!(daemon.wait("p1").await.unwrap(), 0);
    daemon.shutdown_pod("p1").await.unwrap();
    daemon.assert_clean();
}
