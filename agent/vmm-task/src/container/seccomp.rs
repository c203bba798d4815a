//! Compiles the spec's seccomp profile to BPF, seccomp(2).
//!
//! One filter of the kernel here has one default and one other action, a profile has many.
//! So there is a filter per action, and the kernel takes the strictest answer: the first
//! filter gives the profile's default action to everything no rule names, the others answer
//! for the rules of one action and let everything else pass.

use std::collections::BTreeMap;
use std::str::FromStr;

use libcontainer::oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use syscalls::Sysno;

use crate::error::AgentError;
use crate::sys;

/// Filters ready to install.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    flags: libc::c_ulong,
    programs: Vec<BpfProgram>,
}

/// Rules by system call; no rule means whatever the arguments are.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

impl Filters {
    /// Compiles a profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, AgentError> {
        check_architecture(profile)?;
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut named = Rules::new();
        let mut by_action: Vec<(SeccompAction, Rules)> = Vec::new();
        for entry in profile.syscalls().iter().flatten() {
            let wanted = action(entry.action(), entry.errno_ret())?;
            if wanted == default {
                continue;
            }
            add(&mut named, entry)?;
            if wanted == SeccompAction::Allow {
                continue;
            }
            match by_action.iter_mut().find(|(a, _)| *a == wanted) {
                Some((_, rules)) => add(rules, entry)?,
                None => {
                    let mut rules = Rules::new();
                    add(&mut rules, entry)?;
                    by_action.push((wanted, rules));
                }
            }
        }
        let mut programs = Vec::new();
        for (wanted, rules) in by_action {
            programs.push(program(rules, SeccompAction::Allow, wanted)?);
        }
        // Last: it may deny the installation of another one.
        if default != SeccompAction::Allow {
            programs.push(program(named, default, SeccompAction::Allow)?);
        }
        Ok(Self {
            flags: flags(profile)?,
            programs,
        })
    }

    /// Installs all of them in the calling process.
    pub fn install(&self) -> std::io::Result<()> {
        self.programs
            .iter()
            .try_for_each(|p| sys::install_seccomp(p, self.flags))
    }
}

fn invalid(what: &str, why: impl ToString) -> AgentError {
    AgentError::invalid(format!("linux.seccomp.{what}"), why)
}

const fn native() -> (TargetArch, Arch) {
    if cfg!(target_arch = "aarch64") {
        (TargetArch::aarch64, Arch::ScmpArchAarch64)
    } else {
        (TargetArch::x86_64, Arch::ScmpArchX86_64)
    }
}

/// System calls of other architectures end the program, whether listed or not.
fn check_architecture(profile: &LinuxSeccomp) -> Result<(), AgentError> {
    let ours = [native().1, Arch::ScmpArchNative];
    match profile.architectures().as_deref() {
        None | Some([]) => Ok(()),
        Some(listed) if listed.iter().any(|a| ours.contains(a)) => Ok(()),
        Some(listed) => Err(invalid(
            "architectures",
            format!("{listed:?} lacks the guest's own"),
        )),
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong, AgentError> {
    profile.flags().iter().flatten().try_fold(0, |all, flag| {
        Ok(all
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // A process that is about to execute has one thread.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
                other @ LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    return Err(invalid("flags", format!("{other:?} needs a listener")));
                }
            })
    })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<SeccompAction, AgentError> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(errno),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            SeccompAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(errno),
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(invalid(
                "syscalls",
                "SCMP_ACT_NOTIFY is not supported in a guest",
            ));
        }
    })
}

/// Adds an entry of the profile. Names this kernel does not have are left out: profiles list
/// the system calls of every architecture and version.
fn add(rules: &mut Rules, entry: &LinuxSyscall) -> Result<(), AgentError> {
    let conditions = conditions(entry.args().as_deref().unwrap_or_default())?;
    for name in entry.names() {
        let Ok(number) = Sysno::from_str(name) else {
            continue;
        };
        let known = rules.get(&i64::from(number.id())).map(Vec::is_empty);
        let slot = rules.entry(i64::from(number.id())).or_default();
        if conditions.is_empty() {
            slot.clear();
        } else if known != Some(true) {
            slot.extend(conditions.iter().cloned());
        }
    }
    Ok(())
}

/// All arguments have to match, but conditions on the same argument are alternatives, as
/// libseccomp has it.
fn conditions(args: &[LinuxSeccompArg]) -> Result<Vec<SeccompRule>, AgentError> {
    let all = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let repeated = args.iter().enumerate().any(|(i, a)| {
        args.iter()
            .skip(i.saturating_add(1))
            .any(|b| a.index() == b.index())
    });
    let rule = |c| SeccompRule::new(c).map_err(|e| invalid("syscalls.args", e));
    if all.is_empty() {
        Ok(Vec::new())
    } else if repeated {
        all.into_iter().map(|c| rule(vec![c])).collect()
    } else {
        Ok(vec![rule(all)?])
    }
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition, AgentError> {
    let index = u8::try_from(arg.index()).map_err(|e| invalid("syscalls.args.index", e))?;
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let masked = arg.value_two().unwrap_or_default();
            (SeccompCmpOp::MaskedEq(arg.value()), masked)
        }
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, op, value)
        .map_err(|e| invalid("syscalls.args", e))
}

fn program(
    rules: Rules,
    other: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, AgentError> {
    SeccompFilter::new(rules, other, matched, native().0)
        .and_then(BpfProgram::try_from)
        .map_err(|e| invalid("syscalls", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(json: &str) -> Result<Filters, AgentError> {
        Filters::compile(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn one_filter_per_action() {
        let filters = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_NATIVE"],
              "syscalls":[
                {"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
                {"names":["reboot"],"action":"SCMP_ACT_KILL_PROCESS"},
                {"names":["personality"],"action":"SCMP_ACT_ALLOW",
                 "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .unwrap();
        assert_eq!(filters.programs.len(), 3);
    }

    #[test]
    fn allowing_everything_needs_no_filter() {
        let filters = compile(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        assert!(filters.programs.is_empty());
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        for bad in [
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_S390X"]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ERRNO",
                "args":[{"index":9,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        ] {
            assert!(
                compile(bad)
                    .unwrap_err()
                    .to_string()
                    .contains("linux.seccomp"),
                "{bad}"
            );
        }
    }

    #[test]
    fn an_unconditional_rule_wins_over_conditions() {
        let entry = |json: &str| serde_json::from_str::<LinuxSyscall>(json).unwrap();
        let plain = entry(r#"{"names":["read"],"action":"SCMP_ACT_ALLOW"}"#);
        let with = entry(
            r#"{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}"#,
        );
        for order in [[&plain, &with], [&with, &plain]] {
            let mut rules = Rules::new();
            order.iter().for_each(|e| add(&mut rules, e).unwrap());
            assert!(rules[&i64::from(Sysno::read.id())].is_empty());
        }
    }
}
