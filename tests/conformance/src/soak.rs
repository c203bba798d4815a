//! Many pods, one after the other and at once: nothing may be left of them.

use std::time::Instant;

use harness::cri::v1;

use crate::{Setup, Skipped, Suite};

/// Starts and removes pods with a container each, then checks what is left.
///
/// # Errors
/// It cannot be done here.
///
/// # Panics
/// A pod fails, or something is left.
pub fn soak(setup: &Setup, sequential: u32, parallel: u32) -> Result<(), Skipped> {
    let suite = Suite::start(setup)?;
    let begun = Instant::now();
    for number in 0..sequential {
        pod(&suite.kubelet, &format!("seq-{number}"));
        let done = number + 1;
        if done % 10 == 0 && done < sequential {
            let seconds = begun.elapsed().as_secs_f64();
            eprintln!("{done} of {sequential} pods in {seconds:.1} s");
        }
    }
    eprintln!(
        "{sequential} pods in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let begun = Instant::now();
    let kubelet = &suite.kubelet;
    std::thread::scope(|scope| {
        let pods: Vec<_> = (0..parallel)
            .map(|number| scope.spawn(move || pod(kubelet, &format!("par-{number}"))))
            .collect();
        for pod in pods {
            if let Err(panic) = pod.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    eprintln!(
        "{parallel} pods at once in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    suite.finish();
    Ok(())
}

fn pod(kubelet: &harness::kubelet::Kubelet, name: &str) {
    let pod = kubelet.run_pod(name);
    assert_eq!(
        kubelet.pod_state(&pod.id),
        v1::PodSandboxState::SandboxReady
    );
    let main = pod.run(&format!("{name}-main"), "echo up; sleep 1000");
    kubelet.await_log(&format!("{name}-main"), "up");
    kubelet.stop_container(&main, 0);
    kubelet.remove_pod(&pod.id);
}
