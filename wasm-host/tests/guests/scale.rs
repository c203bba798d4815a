//! A thousand at once.

use super::*;

#[tokio::test]
async fn a_thousand_instances_run_side_by_side() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = suite().await;
    let mut started = Vec::new();
    for _ in 0..1000 {
        let container = host().container(settings(&["sleep", "3600"]));
        let process = container.start(lane(), &program, Stdio::default()).await;
        started.push((container, process.unwrap()));
    }
    let running = started
        .iter()
        .filter(|(_, process)| process.exit().is_none());
    assert_eq!(running.count(), 1000);
    for (_, process) in &started {
        process.signal(15);
    }
    for (container, process) in &started {
        assert_eq!(process.wait().await.code, 143);
        assert_eq!(container.stats().memory_bytes, 0);
    }
}
