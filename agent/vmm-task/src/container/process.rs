//! The life of one process, without system calls.

use agent_api::rpc::ExitStatus;

use super::executor::{ExecReport, shell_code};
use crate::clock;
use crate::error::AgentError;
use crate::stdio::{ProcessName, Pumps};

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + signal.
    pub code: u32,
    /// Nanoseconds since the epoch.
    pub at_ns: u64,
    /// Whether the container had an OOM kill by then.
    pub oom_killed: bool,
}

impl From<Exit> for ExitStatus {
    fn from(exit: Exit) -> Self {
        Self {
            code: exit.code,
            exited_at_ns: exit.at_ns,
            oom_killed: exit.oom_killed,
            ..Self::default()
        }
    }
}

/// Where a process is in its life. An exec has no pid before it starts.
#[derive(Debug)]
enum Phase {
    Created {
        pid: Option<i32>,
    },
    /// Told to execute its program; it may end before that is known.
    Starting {
        pid: i32,
        ended: Option<Exit>,
    },
    Running {
        pid: i32,
    },
    Exited(Exit),
}

/// One process of a container.
#[derive(Debug)]
pub struct Process {
    name: ProcessName,
    phase: Phase,
    /// First word of its command line, for messages.
    pub command: String,
    /// Where its start is reported, until it starts.
    pub report: Option<ExecReport>,
    /// Its standard streams.
    pub pumps: Option<Pumps>,
    /// Whether its exit is an event that a new subscriber must hear of.
    pub published: bool,
}

impl Process {
    /// A process that waits to be started.
    pub fn created(name: ProcessName, command: String, pid: Option<i32>) -> Self {
        Self {
            name,
            phase: Phase::Created { pid },
            command,
            report: None,
            pumps: None,
            published: false,
        }
    }

    /// Its name.
    pub const fn name(&self) -> &ProcessName {
        &self.name
    }

    /// Name of its state, for messages.
    pub const fn state(&self) -> &'static str {
        match self.phase {
            Phase::Created { .. } => "created",
            Phase::Starting { .. } => "starting",
            Phase::Running { .. } => "running",
            Phase::Exited(_) => "stopped",
        }
    }

    /// The error for a request that needs another state.
    pub fn wrong_state(&self, needs: &'static str) -> AgentError {
        AgentError::State {
            what: format!("process {}", self.name),
            is: self.state(),
            needs,
        }
    }

    /// Pid while it is not reaped.
    pub const fn pid(&self) -> Option<i32> {
        match self.phase {
            Phase::Created { pid } => pid,
            Phase::Starting { pid, ended: None } | Phase::Running { pid } => Some(pid),
            Phase::Starting { .. } | Phase::Exited(_) => None,
        }
    }

    /// How it ended, if it did.
    pub const fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Exited(exit) => Some(exit),
            _ => None,
        }
    }

    /// Whether its program runs.
    pub const fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Whether nothing has been executed yet.
    pub const fn is_created(&self) -> bool {
        matches!(self.phase, Phase::Created { .. })
    }

    /// Created to starting.
    pub fn starting(&mut self) -> Result<i32, AgentError> {
        match self.phase {
            Phase::Created { pid: Some(pid) } => {
                self.phase = Phase::Starting { pid, ended: None };
                Ok(pid)
            }
            _ => Err(self.wrong_state("created")),
        }
    }

    /// Its program runs. When it has ended already, the exit to be told.
    pub fn started(&mut self, pid: i32) -> Option<Exit> {
        if let Phase::Starting {
            ended: Some(exit), ..
        } = self.phase
        {
            self.phase = Phase::Exited(exit);
            return Some(exit);
        }
        self.phase = Phase::Running { pid };
        None
    }

    /// Its program could not be executed: there is nothing to tell but the start's error.
    /// Its status is what a shell would answer.
    pub fn start_failed(&mut self, e: &AgentError) {
        self.phase = Phase::Exited(Exit {
            code: shell_code(e),
            at_ns: clock::now_ns(),
            oom_killed: false,
        });
    }

    /// It ended. Returns whether to tell that now, rather than when its start is decided.
    pub fn ended(&mut self, exit: Exit) -> bool {
        match &mut self.phase {
            Phase::Starting { ended, .. } => {
                *ended = Some(exit);
                false
            }
            Phase::Exited(_) => false,
            Phase::Created { .. } | Phase::Running { .. } => {
                self.phase = Phase::Exited(exit);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: Option<i32>) -> Process {
        let name = ProcessName {
            container: "c".into(),
            exec: String::new(),
        };
        Process::created(name, "sh".into(), pid)
    }

    const EXIT: Exit = Exit {
        code: 3,
        at_ns: 1,
        oom_killed: false,
    };

    #[test]
    fn a_plain_life() {
        let mut p = process(Some(9));
        assert_eq!((p.state(), p.pid()), ("created", Some(9)));
        p.starting().unwrap();
        assert_eq!(p.started(9), None);
        assert!(p.is_running());
        assert!(p.ended(EXIT));
        assert_eq!(
            (p.state(), p.pid(), p.exit()),
            ("stopped", None, Some(EXIT))
        );
    }

    #[test]
    fn an_exit_before_the_start_is_decided_is_told_once() {
        let mut p = process(Some(9));
        p.starting().unwrap();
        assert!(!p.ended(EXIT));
        assert_eq!(p.pid(), None, "reaped: its number may be another's");
        assert_eq!(p.started(9), Some(EXIT));
        assert!(!p.ended(EXIT));
    }

    #[test]
    fn a_failed_start_is_no_exit_event() {
        let mut p = process(Some(9));
        p.starting().unwrap();
        assert!(!p.ended(EXIT));
        p.start_failed(&AgentError::CommandNotFound("x".into()));
        assert_eq!(p.exit().unwrap().code, 127);
    }

    #[test]
    fn killed_before_it_started() {
        let mut p = process(Some(9));
        assert!(p.ended(EXIT));
        p.starting().unwrap_err();
    }

    #[test]
    fn starting_twice_names_the_state() {
        let mut p = process(Some(9));
        p.starting().unwrap();
        let e = p.starting().unwrap_err().to_string();
        assert!(e.contains("starting") && e.contains("created"), "{e}");
    }
}
