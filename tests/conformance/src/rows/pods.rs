//! Pods and what their containers share.

use harness::cri::v1;

use crate::suite::needs;
use crate::{Outcome, Suite};

pub(super) fn ready(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let mut config = kubelet.pod_config("attributes");
    config
        .annotations
        .insert("note".to_owned(), "kept".to_owned());
    let pod = kubelet.run_pod_of(config);
    let listed = kubelet.pods();
    let listed = listed.iter().find(|listed| listed.id == pod.id).unwrap();
    assert_eq!(listed.state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(listed.labels["app"], "attributes");
    assert_eq!(listed.annotations["note"], "kept");
    assert!(listed.created_at > 0);
    assert_eq!(listed.runtime_handler, kubelet.handler);
    let answer = kubelet.try_pod_status(&pod.id).unwrap();
    let status = answer.status.unwrap();
    assert_eq!(status.metadata.unwrap().uid, "uid-attributes");
    assert!(answer.info.contains_key("info"), "{:?}", answer.info);
    kubelet.stop_pod(&pod.id);
    assert_eq!(
        kubelet.pod_state(&pod.id),
        v1::PodSandboxState::SandboxNotready
    );
    kubelet.remove_pod(&pod.id);
    assert!(kubelet.pods().iter().all(|listed| listed.id != pod.id));
    Ok(())
}

pub(super) fn idempotent(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let pod = kubelet.run_pod("twice").id;
    for _ in 0..2 {
        kubelet.stop_pod(&pod);
    }
    for _ in 0..2 {
        kubelet.remove_pod(&pod);
    }
    kubelet.stop_pod("0123456789abcdef");
    kubelet.remove_pod("0123456789abcdef");
    Ok(())
}

pub(super) fn shared_namespaces(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    // The one listens and writes, the other finds it.
    let script = "mkdir -p /tmp/www && echo shared > /tmp/www/page && \
                  httpd -p 127.0.0.1:8081 -h /tmp/www && echo shared > /dev/shm/note";
    assert_eq!(kubelet.output(&shell, script), "");
    let found = suite.output_of(suite.container(
        "peer",
        "wget -qO- http://127.0.0.1:8081/page || \
         printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | nc -w 20 127.0.0.1 8081 | tail -n 1; \
         cat /dev/shm/note; hostname",
    ));
    assert_eq!(found, "shared\nshared\nshared\n");
    Ok(())
}

/// A container with `mode` for its PID namespace, which lists the processes it sees.
fn listing(suite: &Suite, mode: v1::NamespaceMode, target: &str) -> v1::ContainerConfig {
    let mut config = suite.container("pids", "echo self $$; ps -o args");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options = Some(v1::NamespaceOption {
        pid: mode.into(),
        target_id: target.to_owned(),
        ..Default::default()
    });
    config
}

pub(super) fn pid_namespaces(suite: &Suite) -> Outcome {
    let shell = suite.shell();
    let private = suite.output_of(listing(suite, v1::NamespaceMode::Container, ""));
    assert!(private.starts_with("self 1\n"), "{private}");
    assert!(!private.contains("sleep 1000"), "{private}");
    let of_target = suite.output_of(listing(suite, v1::NamespaceMode::Target, &shell));
    assert!(!of_target.starts_with("self 1\n"), "{of_target}");
    assert!(of_target.contains("sleep 1000"), "{of_target}");
    // The shell came without a wish, which means the pod's.
    let of_pod = suite.output_of(listing(suite, v1::NamespaceMode::Pod, ""));
    assert!(!of_pod.starts_with("self 1\n"), "{of_pod}");
    assert!(of_pod.contains("sleep 1000"), "{of_pod}");
    assert!(!of_pod.contains("vmm-task"), "the agent is seen: {of_pod}");
    Ok(())
}

/// Why a pod with these options of namespaces does not start.
fn refusal(suite: &Suite, options: v1::NamespaceOption) -> String {
    let mut config = suite.kubelet.pod_config("refused");
    config.linux = Some(v1::LinuxPodSandboxConfig {
        security_context: Some(v1::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        }),
        ..Default::default()
    });
    match suite.kubelet.try_run_pod(config) {
        Ok(pod) => {
            suite.kubelet.remove_pod(&pod.id);
            panic!("a pod with {options:?} runs", options = "these options");
        }
        Err(why) => why.message().to_owned(),
    }
}

pub(super) fn host_namespaces(suite: &Suite) -> Outcome {
    let node = v1::NamespaceMode::Node.into();
    let pid = v1::NamespaceOption {
        pid: node,
        ..Default::default()
    };
    let why = refusal(suite, pid);
    assert!(why.contains("hostPID"), "{why}");
    let ipc = v1::NamespaceOption {
        ipc: node,
        ..Default::default()
    };
    let why = refusal(suite, ipc);
    assert!(why.contains("hostIPC"), "{why}");
    // containerd 2.1 itself crashes on a pod with the host's network behind a shim.
    if suite.mode == Some(crate::Mode::Proxy) {
        let network = v1::NamespaceOption {
            network: node,
            ..Default::default()
        };
        let why = refusal(suite, network);
        assert!(why.contains("hostNetwork"), "{why}");
    }
    Ok(())
}

pub(super) fn user_namespaces(suite: &Suite) -> Outcome {
    let mapping = v1::IdMapping {
        host_id: 100_000,
        container_id: 0,
        length: 65536,
    };
    let options = v1::NamespaceOption {
        userns_options: Some(v1::UserNamespace {
            mode: v1::NamespaceMode::Pod.into(),
            uids: vec![mapping],
            gids: vec![mapping],
        }),
        ..Default::default()
    };
    let why = refusal(suite, options).to_lowercase();
    assert!(why.contains("user namespace"), "{why}");
    Ok(())
}

pub(super) fn sysctls(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let mut config = kubelet.pod_config("settings");
    let settings = [
        ("kernel.shm_rmid_forced", "1"),
        ("net.ipv4.ip_unprivileged_port_start", "1000"),
    ];
    config.linux = Some(v1::LinuxPodSandboxConfig {
        sysctls: settings.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        ..Default::default()
    });
    let pod = kubelet.run_pod_of(config.clone());
    let script = "cat /proc/sys/kernel/shm_rmid_forced \
                  /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let (status, log) = pod.finish(suite.container("settings", script));
    kubelet.remove_pod(&pod.id);
    assert_eq!(status.exit_code, 0, "{log}");
    assert_eq!(crate::suite::lines_of(&log, "stdout"), "1\n1000\n");
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = [("kernel.nonsense".to_owned(), "1".to_owned())].into();
    let why = kubelet.try_run_pod(config).unwrap_err();
    assert!(why.message().contains("kernel.nonsense"), "{why}");
    Ok(())
}

pub(super) fn shared_memory(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    let size = kubelet.output(&shell, "df -k /dev/shm | tail -n 1 | awk '{print $2}'");
    assert_eq!(size, "65536\n", "KiB");
    let _ = kubelet.output(&shell, "echo one > /dev/shm/between");
    let script = "cat /dev/shm/between; echo two > /dev/shm/between; stat -c %a /dev/shm";
    let seen = suite.output_of(suite.container("shm", script));
    assert_eq!(seen, "one\n1777\n");
    assert_eq!(kubelet.output(&shell, "cat /dev/shm/between"), "two\n");
    Ok(())
}

pub(super) fn host_name(suite: &Suite) -> Outcome {
    let shell = suite.shell();
    let found = suite
        .kubelet
        .output(&shell, "hostname; cat /etc/hostname; echo $HOSTNAME");
    assert_eq!(found, "shared\nshared\nshared\n");
    Ok(())
}

pub(super) fn dns(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let found = kubelet.output(&suite.shell(), "cat /etc/resolv.conf /etc/hosts");
    assert!(
        found.starts_with("search svc.local\nnameserver 10.96.0.10\n"),
        "{found}"
    );
    assert!(found.contains("localhost"), "{found}");
    // The kubelet brings a hosts file of its own.
    let hosts = suite.folder().join("hosts");
    std::fs::write(&hosts, "10.0.0.1 alias.example\n").unwrap();
    let mut config = suite.container("aliases", "cat /etc/hosts");
    config
        .mounts
        .push(harness::kubelet::bind(&hosts, "/etc/hosts"));
    let found = suite.output_of(config);
    assert_eq!(found, "10.0.0.1 alias.example\n");
    needs(true, "")
}
