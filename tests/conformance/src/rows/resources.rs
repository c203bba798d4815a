//! Limits and figures.

use harness::cgroup::PodCgroup;
use harness::cri::v1;
use harness::eventually;
use harness::kubelet::SOON;

use crate::{Backend, Outcome, Suite, skip};

fn limited(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

pub(super) fn out_of_memory(suite: &Suite) -> Outcome {
    let mut config = suite.container("hungry", "exec tail /dev/zero");
    limited(&mut config).memory_limit_in_bytes = 16 << 20;
    let id = suite.pod().run_of(config);
    let ended = suite.kubelet.exited(&id);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    suite.kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn container_stats(suite: &Suite) -> Outcome {
    let shell = suite.shell();
    let _ = suite
        .kubelet
        .output(&shell, "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done");
    let request = v1::ContainerStatsRequest {
        container_id: shell.clone(),
    };
    let stats = suite.kubelet.cri.container_stats(request).unwrap();
    let stats = stats.stats.unwrap();
    let cpu = stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value;
    let memory = stats.memory.unwrap();
    let working_set = memory.working_set_bytes.unwrap().value;
    assert!(cpu > 1_000_000, "{cpu} ns of CPU time");
    assert!(
        (4096..1 << 27).contains(&working_set),
        "{working_set} bytes"
    );
    let listed = v1::ListContainerStatsRequest::default();
    let listed = suite
        .kubelet
        .cri
        .list_container_stats(listed)
        .unwrap()
        .stats;
    let ids: Vec<_> = listed
        .into_iter()
        .filter_map(|stats| stats.attributes)
        .map(|attributes| attributes.id)
        .collect();
    assert!(ids.contains(&shell), "{ids:?}");
    Ok(())
}

fn cpu_of(suite: &Suite, pod: &str) -> u64 {
    let request = v1::PodSandboxStatsRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    let stats = suite.kubelet.cri.pod_sandbox_stats(request).unwrap();
    let linux = stats.stats.unwrap().linux.unwrap();
    let cpu = linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
    cpu.map_or(0, |cpu| cpu.value)
}

/// containerd reads them from the host's cgroup of the pod.
pub(super) fn pod_stats(suite: &Suite) -> Outcome {
    if suite.backend != Some(Backend::Qemu) {
        return skip("threads of the daemon are not in the pod's cgroup (docs/decisions.md)");
    }
    let kubelet = &suite.kubelet;
    let cgroup = match PodCgroup::new("kuasar-row16") {
        Ok(cgroup) => cgroup,
        Err(why) => return skip(why),
    };
    let mut config = kubelet.pod_config("counted");
    config.linux = Some(v1::LinuxPodSandboxConfig {
        cgroup_parent: cgroup.path(),
        ..Default::default()
    });
    let pod = kubelet.run_pod_of(config);
    let _busy = pod.run("busy", "while :; do :; done");
    let first = cpu_of(suite, &pod.id);
    let grown = eventually("CPU time of the pod", SOON, || {
        let now = cpu_of(suite, &pod.id);
        (now > first + 500_000_000).then_some(now)
    });
    assert!(first > 0 && grown > first);
    kubelet.remove_pod(&pod.id);
    Ok(())
}

pub(super) fn update(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let mut config = suite.container("resized", "echo up; sleep 1000");
    limited(&mut config).memory_limit_in_bytes = 32 << 20;
    let name = config.metadata.clone().unwrap().name;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "up");
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 48 << 20,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
    };
    kubelet.cri.update_container_resources(request).unwrap();
    let (_, _, hidden) = kubelet.exec(&id, "test -e /sys/fs/cgroup/memory.max");
    if hidden != 0 {
        kubelet.stop_container(&id, 0);
        kubelet.remove_container(&id);
        return skip("taken, but the container does not see its cgroup to show it");
    }
    let seen = kubelet.output(&id, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(seen, format!("{}\n50000 100000\n", 48 << 20));
    kubelet.stop_container(&id, 0);
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn pod_size(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let mut config = kubelet.pod_config("sized");
    let limits = v1::LinuxContainerResources {
        memory_limit_in_bytes: 192 << 20,
        ..Default::default()
    };
    let linux = config.linux.get_or_insert_default();
    linux.resources = Some(limits);
    let pod = kubelet.run_pod_of(config);
    let script = "awk '/MemTotal/ {print $2}' /proc/meminfo";
    let (_, log) = pod.finish(suite.container("sized", script));
    kubelet.remove_pod(&pod.id);
    let kib: u64 = crate::suite::lines_of(&log, "stdout")
        .trim()
        .parse()
        .unwrap();
    assert!(((192 << 10)..(256 << 10)).contains(&kib), "{kib} KiB");
    Ok(())
}

/// Whoever drives cgroups, the pod's parent is a slice by name.
pub(super) fn systemd_cgroup(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let mut config = kubelet.pod_config("sliced");
    config.linux = Some(v1::LinuxPodSandboxConfig {
        cgroup_parent: "kubepods-besteffort-podrow49.slice".to_owned(),
        ..Default::default()
    });
    let pod = kubelet.run_pod_of(config);
    let (ended, log) = pod.finish(suite.container("sliced", "echo runs"));
    kubelet.remove_pod(&pod.id);
    assert_eq!(ended.exit_code, 0, "{log}");
    Ok(())
}
