use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use serde_json::json;

use super::*;

fn guest(files: &[PodFile]) -> Guest<'_> {
    Guest {
        container: "c1",
        files,
        pod_pid: 77,
        pids: &[35],
        privileged: false,
    }
}

fn hosts() -> PodFile {
    PodFile {
        destination: "/etc/hosts",
        guest_path: "/run/kuasar/state/etc/hosts".to_owned(),
    }
}

#[test]
fn host_facts_are_taken_out_and_unknown_keys_stay() {
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "hostname": "node",
        "futureKey": {"a": [1, 2]},
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "args": ["sh"], "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x",
            "noNewPrivileges": true,
        },
        "hooks": {"prestart": [{"path": "/bin/hook"}]},
        "linux": {
            "cgroupsPath": "/kubepods/pod1/c1",
            "namespaces": [
                {"type": "pid"},
                {"type": "network", "path": "/proc/0/ns/net"},
                {"type": "ipc", "path": "/proc/0/ns/ipc"},
                {"type": "uts", "path": "/proc/0/ns/uts"},
                {"type": "mount"},
                {"type": "cgroup", "path": "/proc/0/ns/cgroup"},
            ],
            "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}],
            "mountLabel": "system_u",
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "resources": {
                "cpu": {"shares": 2, "cpus": "0-3"},
                "memory": {"limit": 1000},
                "blockIO": {"weight": 1},
            },
            "maskedPaths": ["/proc/kcore"],
        },
    });
    let needs = rewrite(&mut spec, &guest(&[])).unwrap();
    assert_eq!(needs, Needs::default());
    assert_eq!(
        spec,
        json!({
            "ociVersion": "1.1.0",
            "futureKey": {"a": [1, 2]},
            "root": {"path": "/run/kuasar/state/c1/rootfs", "readonly": true},
            "process": {"args": ["sh"], "noNewPrivileges": true},
            "linux": {
                "cgroupsPath": "/kuasar/c1",
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                "resources": {"cpu": {"shares": 2}, "memory": {"limit": 1000}},
                "maskedPaths": ["/proc/kcore"],
            },
            "mounts": [],
        })
    );
}

#[test]
fn a_container_with_its_own_uts_namespace_keeps_its_hostname() {
    let mut spec = json!({
        "hostname": "mine",
        "linux": {"namespaces": [{"type": "uts"}]},
    });
    rewrite(&mut spec, &guest(&[])).unwrap();
    assert_eq!(spec["hostname"], "mine");
    assert_eq!(spec["linux"]["namespaces"], json!([{"type": "uts"}]));
}

#[test]
fn binds_come_through_the_share_and_the_rest_is_the_guests() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let link = dir.path().join("link");
    symlink(&file, &link).unwrap();
    let mut spec = json!({"mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": dir.path(),
         "options": ["rbind", "rslave", "ro"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
        {"destination": "/file", "type": "none", "source": link, "options": ["bind"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/nonexistent/shm",
         "options": ["rbind"]},
     ], "linux": {"namespaces": [{"type": "ipc", "path": "/proc/77/ns/ipc"}]}});
    let binds = rewrite(&mut spec, &guest(&[])).unwrap().binds;
    let options = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
    assert_eq!(
        binds,
        [
            Bind {
                source: dir.path().to_owned(),
                name: "0".to_owned(),
                options: options(&["rbind", "rslave", "ro"]),
            },
            Bind {
                source: link,
                name: "1".to_owned(),
                options: options(&["bind"]),
            },
        ]
    );
    assert_eq!(
        spec["mounts"],
        json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind",
             "source": "/run/kuasar/state/c1/mounts/0", "options": ["rbind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
            {"destination": "/file", "type": "none",
             "source": "/run/kuasar/state/c1/mounts/1", "options": ["bind"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
             "options": ["bind", "nosuid", "noexec", "nodev"]},
        ])
    );
}

#[test]
fn pod_files_are_added_where_the_spec_has_none() {
    let mut spec = json!({"root": {"readonly": true}});
    rewrite(&mut spec, &guest(&[hosts()])).unwrap();
    assert_eq!(
        spec["mounts"],
        json!([{
            "destination": "/etc/hosts", "type": "bind",
            "source": "/run/kuasar/state/etc/hosts", "options": ["bind", "rprivate", "ro"],
        }])
    );
}

#[test]
fn a_hosts_file_of_the_spec_wins_but_a_made_up_folder_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hosts");
    fs::write(&file, "127.0.0.1 localhost").unwrap();
    let mount = |source: &PathBuf| {
        json!({"mounts": [{
            "destination": "/etc/hosts", "type": "bind", "source": source, "options": ["rbind"],
        }]})
    };
    let mut spec = mount(&file);
    assert_eq!(
        rewrite(&mut spec, &guest(&[hosts()])).unwrap().binds.len(),
        1
    );
    assert_eq!(spec["mounts"][0]["source"], "/run/kuasar/state/c1/mounts/0");

    let mut spec = mount(&dir.path().to_owned());
    assert_eq!(
        rewrite(&mut spec, &guest(&[hosts()])).unwrap().binds.len(),
        0
    );
    assert_eq!(spec["mounts"][0]["source"], "/run/kuasar/state/etc/hosts");
}

#[test]
fn sources_that_cannot_be_shared_are_named() {
    for (source, part) in [
        ("/dev/null", "device"),
        ("/nonexistent", "cannot be used"),
        ("relative", "absolute"),
    ] {
        let mut spec = json!({"mounts": [{
            "destination": "/x", "type": "bind", "source": source,
        }]});
        let error = rewrite(&mut spec, &guest(&[])).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(source), "{error}");
        assert!(error.contains("/x"), "{error}");
    }
}

#[test]
fn specs_of_the_wrong_shape_are_errors() {
    for mut spec in [
        json!([]),
        json!({"root": 1}),
        json!({"mounts": {}}),
        json!({"mounts": [{"type": "bind"}]}),
    ] {
        assert_eq!(
            rewrite(&mut spec, &guest(&[])).unwrap_err().code(),
            super::super::ErrorCode::InvalidArgument,
            "{spec}"
        );
    }
}

#[test]
fn pid_namespaces_of_the_pod_and_of_its_containers_are_found_in_the_guest() {
    let rewritten = |path: &str| {
        let mut spec = json!({"linux": {"namespaces": [{"type": "pid", "path": path}]}});
        rewrite(&mut spec, &guest(&[])).map(|_| spec["linux"]["namespaces"][0]["path"].clone())
    };
    assert_eq!(
        rewritten("/proc/77/ns/pid").unwrap(),
        agent_api::POD_PID_NAMESPACE
    );
    assert_eq!(rewritten("/proc/35/ns/pid").unwrap(), "/proc/35/ns/pid");
    assert_eq!(rewritten("").unwrap(), json!(null));
    for path in ["/proc/36/ns/pid", "/proc/self/ns/pid", "/etc/passwd"] {
        let error = rewritten(path).unwrap_err().to_string();
        assert!(error.contains(path), "{error}");
    }
}

#[test]
fn what_only_the_host_can_do_is_refused_by_name() {
    let error = |mut spec: Value| rewrite(&mut spec, &guest(&[])).unwrap_err().to_string();
    let why = error(json!({"linux": {"devices": [{"path": "/dev/fuse"}]}}));
    assert!(why.contains("/dev/fuse"), "{why}");
    let why = error(json!({"process": {"apparmorProfile": "mine"}}));
    assert!(why.contains("mine"), "{why}");
    let huge = |limit: u32| json!({"linux": {"resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": limit}]}}});
    let why = error(huge(4096));
    assert!(
        why.contains("hugepageLimits") && why.contains("2MB"),
        "{why}"
    );
    rewrite(&mut huge(0), &guest(&[])).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let why = error(json!({"mounts": [
        {"destination": "/s", "type": "bind", "source": socket, "options": ["bind"]},
    ]}));
    assert!(why.contains("is a socket"), "{why}");
}

#[test]
fn a_volume_on_shared_memory_is_a_volume() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = json!({
        "mounts": [{"destination": "/dev/shm", "type": "bind", "source": dir.path(),
                    "options": ["rbind"]}],
        "linux": {"namespaces": [{"type": "ipc", "path": "/proc/77/ns/ipc"}]},
    });
    assert_eq!(rewrite(&mut spec, &guest(&[])).unwrap().binds.len(), 1);
    // Without the pod's IPC namespace its shared memory is not the container's.
    let mut spec = json!({"mounts": [{"destination": "/dev/shm", "type": "tmpfs"}]});
    rewrite(&mut spec, &guest(&[])).unwrap();
    assert_eq!(spec["mounts"][0]["type"], "tmpfs");
}
