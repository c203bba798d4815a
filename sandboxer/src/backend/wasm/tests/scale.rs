//! A thousand containers of one daemon.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_containers_run_side_by_side() {
    const PODS: usize = 4;
    const EACH: usize = 250;
    harness::skip_if!(missing());
    let daemon = Daemon::start(config::Wasm {
        max_instances: 1100,
        ..settings()
    })
    .await;
    let mut pods = Vec::new();
    for n in 0..PODS {
        pods.push(daemon.pod(&format!("p{n}")).await);
    }
    let ids: Vec<_> = (0..EACH).map(|n| format!("c{n}")).collect();
    let all = async |what: &str| {
        let starting = pods.iter().map(async |tasks| {
            for id in &ids {
                match what {
                    "start" => {
                        let process = process(&["sleep", "3600"]);
                        tasks.create(id, process, json!({})).await.unwrap();
                        tasks.start(id, "").await.unwrap();
                    }
                    "kill" => tasks.kill(id, "", 15).await,
                    _ => {
                        assert_eq!(tasks.wait(id, "").await, 143);
                        tasks.delete(id, "").await;
                    }
                }
            }
        });
        futures::future::join_all(starting).await;
    };
    all("start").await;
    for tasks in &pods {
        for id in &ids {
            let request = api::StateRequest {
                id: id.clone(),
                ..Default::default()
            };
            let state = tasks.client.state(context(), &request).await.unwrap();
            assert_eq!(
                state.status(),
                containerd_shim_protos::types::task::Status::RUNNING
            );
        }
    }
    // It still answers, and runs what is new.
    let (code, out) = pods[0].run("one-more", &["args"], json!({})).await;
    assert_eq!((code, out.as_str()), (0, "/suite.wasm\nargs\n"));
    all("kill").await;
    all("end").await;
    daemon.end().await;
}
