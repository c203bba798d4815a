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
    // Few pages: an emulated guest kernel takes ten milliseconds for each.
    limited(&mut config).memory_limit_in_bytes = 8 << 20;
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

/// Threads of a process can be counted apart from it under cgroup v1 only.
fn counted(suite: &Suite) -> Outcome {
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let threads = suite.backend != Some(Backend::Qemu);
    if unified && threads {
        return skip("under cgroup v2 threads are counted with the daemon (docs/decisions.md)");
    }
    suite.with_node(|_| ())
}

/// containerd reads them from the host's cgroup of the pod.
pub(super) fn pod_stats(suite: &Suite) -> Outcome {
    counted(suite)?;
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
    // containerd works out what is free from the limit that the guest's kernel has.
    let request = v1::ContainerStatsRequest {
        container_id: id.clone(),
    };
    let stats = kubelet.cri.container_stats(request).unwrap().stats.unwrap();
    let memory = stats.memory.unwrap();
    let free = memory.available_bytes.unwrap().value;
    let limit = free + memory.working_set_bytes.unwrap().value;
    assert_eq!(limit, 48 << 20);
    // Half a CPU: of ten hundredths of a second, some must have been waited for.
    let script = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; echo done";
    assert_eq!(kubelet.output(&id, script), "done\n");
    let usage = suite.with_node(|node| {
        let out = node
            .containerd
            .ctr(&["tasks", "metrics", "--format", "json", &id]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    })?;
    let usage: serde_json::Value = serde_json::from_str(&usage).unwrap();
    // The metrics of cgroup v2, and of v1, which 1.7 is given.
    let throttled = ["/cpu/nr_throttled", "/cpu/throttling/throttled_periods"];
    let throttled = throttled.iter().find_map(|at| usage.pointer(at)?.as_u64());
    assert!(throttled > Some(0), "{usage}");
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
    let id = pod.run("sized", "echo up; sleep 1000");
    let size = || -> (u64, u64) {
        let script = "awk '/MemTotal/ {print $2}' /proc/meminfo; nproc";
        let seen = kubelet.output(&id, script);
        let mut numbers = seen.lines().map(|line| line.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    };
    let (kib, cpus) = size();
    assert!(((192 << 10)..(256 << 10)).contains(&kib), "{kib} KiB");
    assert_eq!(cpus, 1);
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 300 << 20,
            cpu_quota: 200_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
    };
    kubelet.cri.update_container_resources(request).unwrap();
    let grown = size();
    kubelet.remove_pod(&pod.id);
    if suite.backend == Some(Backend::Qemu) && grown == (kib, cpus) {
        return skip("as limits ask at its start; VMs of QEMU do not grow while they run");
    }
    assert!(grown.0 > 300 << 10 && grown.1 == 2, "{grown:?}");
    Ok(())
}

/// Numbers of the host's CPUs mean nothing in a guest: the VM has as many as the pod asks for.
pub(super) fn cpu_sets(suite: &Suite) -> Outcome {
    let mut config = suite.container("pinned", "nproc");
    limited(&mut config).cpuset_cpus = "0".to_owned();
    assert_eq!(suite.output_of(config), "1\n");
    // Huge pages are refused; containerd passes their limits on where the host counts them.
    Ok(())
}

/// Whoever drives cgroups, the pod's parent is a slice by name.
pub(super) fn systemd_cgroup(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let counted = counted(suite);
    let name = format!("kubepods-besteffort-podrow{}.slice", std::process::id());
    let slice = match PodCgroup::slice(&name) {
        Ok(slice) => slice,
        Err(why) => return skip(why),
    };
    let mut config = kubelet.pod_config("sliced");
    config.linux = Some(v1::LinuxPodSandboxConfig {
        cgroup_parent: name,
        ..Default::default()
    });
    let pod = kubelet.run_pod_of(config);
    let (ended, log) = pod.finish(suite.container("sliced", "echo runs"));
    let members = slice.members();
    kubelet.remove_pod(&pod.id);
    assert_eq!(ended.exit_code, 0, "{log}");
    counted?;
    assert!(!members.is_empty(), "nothing is counted in {slice:?}");
    Ok(())
}
