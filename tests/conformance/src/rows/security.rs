//! Users, capabilities, filters: enforced in the guest.

use std::fs;
use std::path::Path;

use harness::cri::v1;

use crate::suite::lines_of;
use crate::{Outcome, Suite, skip};

fn context(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// What a container prints of `/proc/self/status` for a key, in the given context.
fn status_of(
    suite: &Suite,
    key: &str,
    set: impl FnOnce(&mut v1::LinuxContainerSecurityContext),
) -> String {
    let script = format!("sed -n 's/^{key}:[[:space:]]*//p' /proc/self/status");
    let mut config = suite.container("status", &script);
    set(context(&mut config));
    suite.output_of(config).trim().to_owned()
}

const fn number(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

pub(super) fn users(suite: &Suite) -> Outcome {
    let mut config = suite.container(
        "user",
        "id -u; id -g; id -G; touch /tmp/mine && ls -ln /tmp/mine",
    );
    let wanted = context(&mut config);
    wanted.run_as_user = number(1234);
    wanted.run_as_group = number(5678);
    wanted.supplemental_groups = vec![99, 100];
    let printed = suite.output_of(config);
    assert!(printed.starts_with("1234\n5678\n"), "{printed}");
    let groups: Vec<&str> = printed.lines().nth(2).unwrap().split(' ').collect();
    assert!(
        groups.contains(&"99") && groups.contains(&"100"),
        "{printed}"
    );
    Ok(())
}

pub(super) fn capabilities(suite: &Suite) -> Outcome {
    let effective = |add: &[&str], drop: &[&str]| {
        let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let bits = status_of(suite, "CapEff", |context| {
            context.capabilities = Some(v1::Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                ..Default::default()
            });
        });
        u64::from_str_radix(&bits, 16).unwrap()
    };
    let (net_admin, chown) = (1 << 12, 1);
    let bits = effective(&["NET_ADMIN"], &["CHOWN"]);
    assert!(bits & net_admin != 0 && bits & chown == 0, "{bits:x}");
    assert_eq!(effective(&[], &["ALL"]), 0);
    Ok(())
}

pub(super) fn no_new_privs(suite: &Suite) -> Outcome {
    let set = status_of(suite, "NoNewPrivs", |context| context.no_new_privs = true);
    assert_eq!(set, "1");
    Ok(())
}

pub(super) fn privileged(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let pod = suite.privileged_pod("privileged");
    let mut config = suite.container(
        "privileged",
        "mkdir -p /tmp/m && mount -t tmpfs tmpfs /tmp/m && echo mounted; \
         test -e /dev/kvm && echo kvm; test -e /dev/sda && echo disk; true",
    );
    context(&mut config).privileged = true;
    let (ended, log) = pod.finish(config);
    kubelet.remove_pod(&pod.id);
    assert_eq!(ended.exit_code, 0, "{log}");
    assert_eq!(lines_of(&log, "stdout"), "mounted\n", "{log}");
    Ok(())
}

pub(super) fn read_only(suite: &Suite) -> Outcome {
    let mut config = suite.container(
        "ro",
        "touch /file 2>/dev/null && echo written; cat /proc/kcore >/dev/null 2>&1; \
         wc -c < /proc/timer_list; echo 1 2>/dev/null > /proc/sys/kernel/panic && echo set; true",
    );
    let wanted = context(&mut config);
    wanted.readonly_rootfs = true;
    wanted.masked_paths = vec!["/proc/timer_list".to_owned()];
    wanted.readonly_paths = vec!["/proc/sys".to_owned()];
    assert_eq!(suite.output_of(config), "0\n");
    Ok(())
}

pub(super) fn seccomp(suite: &Suite) -> Outcome {
    use v1::security_profile::ProfileType;
    let profile = |kind: ProfileType, file: &Path| v1::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: file.to_string_lossy().into_owned(),
    };
    let none = Path::new("");
    let mode = status_of(suite, "Seccomp", |context| {
        context.seccomp = Some(profile(ProfileType::Unconfined, none));
    });
    assert_eq!(mode, "0", "unconfined");
    let mode = status_of(suite, "Seccomp", |context| {
        context.seccomp = Some(profile(ProfileType::RuntimeDefault, none));
    });
    let host_can = Path::new("/proc/sys/kernel/seccomp/actions_avail").exists();
    assert_eq!(mode, if host_can { "2" } else { "0" }, "default");
    let file = suite.folder().join("profile.json");
    let rules = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    fs::write(&file, rules.to_string()).unwrap();
    let mut config = suite.container("filtered", "mkdir /tmp/x 2>/dev/null || echo refused");
    context(&mut config).seccomp = Some(profile(ProfileType::Localhost, &file));
    if host_can {
        assert_eq!(suite.output_of(config), "refused\n");
    }
    Ok(())
}

pub(super) fn lsm(suite: &Suite) -> Outcome {
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        return skip("the host has no AppArmor, and so containerd passes no profile on");
    }
    let mut config = suite.container("confined", "true");
    context(&mut config).apparmor = Some(v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::Localhost.into(),
        localhost_ref: "unknown".to_owned(),
    });
    let why = suite.pod().try_run(config).unwrap_err();
    assert!(why.message().to_lowercase().contains("apparmor"), "{why}");
    Ok(())
}
