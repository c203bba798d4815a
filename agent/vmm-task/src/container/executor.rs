//! The last step inside the container: executing its program, and telling how that went.
//!
//! The report travels over a close-on-exec pipe: end of file means the program runs, four
//! bytes are the errno of the attempt. The runtime's own checks look at files before the
//! container is entered for good and know no errno, so they are not used.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::privileges::Privileges;
use crate::error::AgentError;
use crate::fd::{self, Fd};
use crate::sys;

/// The agent's end of the report.
#[derive(Debug)]
pub struct ExecReport(Fd);

impl ExecReport {
    /// Waits until the program runs or has failed to.
    pub async fn wait(mut self, command: &str) -> Result<(), AgentError> {
        let mut errno = [0; 4];
        let n = self.0.read(&mut errno).await.unwrap_or(0);
        verdict(errno.get(..n).unwrap_or_default(), command)
    }

    /// The failure, if one has been reported already.
    pub fn failure(&self, command: &str) -> Result<(), AgentError> {
        let mut errno = [0; 4];
        let n = self.0.try_read(&mut errno).ok().flatten().unwrap_or(0);
        verdict(errno.get(..n).unwrap_or_default(), command)
    }
}

fn verdict(report: &[u8], command: &str) -> Result<(), AgentError> {
    let Ok(errno) = report.try_into().map(i32::from_ne_bytes) else {
        return Ok(());
    };
    let command = command.to_owned();
    Err(match Errno::from_raw(errno) {
        Errno::ENOENT | Errno::ENOTDIR => AgentError::CommandNotFound(command),
        e => AgentError::NotExecutable(command, e.into()),
    })
}

/// Executes the process of a spec.
#[derive(Clone, Debug)]
pub struct GuestExecutor {
    // Shared by the clones the runtime makes; each forked child has its own copy.
    report: Rc<OwnedFd>,
    find_home: bool,
    privileges: Privileges,
    env: RefCell<HashMap<String, String>>,
}

impl GuestExecutor {
    /// An executor and where it reports to.
    pub fn new(find_home: bool, privileges: Privileges) -> Result<(Self, ExecReport), AgentError> {
        let pipe = pipe2(OFlag::O_CLOEXEC);
        let (read, write) = pipe.map_err(|e| AgentError::io("pipe2")(e.into()))?;
        let executor = Self {
            report: Rc::new(write),
            find_home,
            privileges,
            env: RefCell::default(),
        };
        let read = Fd::from_blocking(read).map_err(AgentError::io("O_NONBLOCK"))?;
        Ok((executor, ExecReport(read)))
    }
}

impl Executor for GuestExecutor {
    /// Called before the process waits to be started.
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        fd::close_all_in_child();
        Ok(())
    }

    fn setup_envs(&self, env: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        self.env.replace(env);
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let args = process.args().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let declared = process.env().as_deref().unwrap_or_default();
        let home = self.find_home.then(|| home(process.user().uid()));
        let env = environment(declared, &self.env.borrow(), home.as_deref());
        let ready = sys::reset_signals().and_then(|()| self.privileges.apply());
        let errno = match ready {
            Ok(()) => exec_in_path(args, &env),
            Err(e) => Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
        };
        // Nobody is left to tell when this fails.
        let _ = nix::unistd::write(&*self.report, &(errno as i32).to_ne_bytes());
        Err(ExecutorError::Other(errno.to_string()))
    }
}

/// The declared variables in their order, with the looked up `HOME`, then those the runtime
/// added.
fn environment(
    declared: &[String],
    runtime: &HashMap<String, String>,
    home: Option<&str>,
) -> Vec<String> {
    let name = |entry: &String| entry.split('=').next().unwrap_or_default().to_owned();
    let mut env = declared.to_vec();
    if let Some(home) = home {
        env.retain(|e| name(e) != "HOME");
        env.push(format!("HOME={home}"));
    }
    for (key, value) in runtime {
        if !env.iter().any(|e| name(e) == *key) {
            env.push(format!("{key}={value}"));
        }
    }
    env
}

/// The home folder of a user by the container's own `/etc/passwd`.
fn home(uid: u32) -> String {
    let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
    home_in(&String::from_utf8_lossy(&passwd), uid)
        .unwrap_or("/")
        .to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        fields.nth(2).filter(|home| found && !home.is_empty())
    })
}

/// Executes `args`, searching `PATH` of `env` as execvp(3) does, but never through a shell.
fn exec_in_path(args: &[String], env: &[String]) -> Errno {
    let path = env
        .iter()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or_default();
    let Some(program) = args.first().filter(|p| !p.is_empty()) else {
        return Errno::ENOENT;
    };
    let strings = |list: &[String]| {
        list.iter()
            .map(|s| CString::new(s.as_str()))
            .collect::<Result<Vec<_>, _>>()
    };
    let (Ok(argv), Ok(envp)) = (strings(args), strings(env)) else {
        return Errno::EINVAL;
    };
    let attempt =
        |file: String| CString::new(file).map_or(Errno::EINVAL, |f| sys::exec(&f, &argv, &envp));
    if program.contains('/') {
        return attempt(program.clone());
    }
    let mut worst = Errno::ENOENT;
    for folder in path.split(':') {
        let folder = if folder.is_empty() { "." } else { folder };
        match attempt(format!("{folder}/{program}")) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => worst = Errno::EACCES,
            other => return other,
        }
    }
    worst
}

/// What a shell would answer for a program that could not be started.
pub fn shell_code(e: &AgentError) -> u32 {
    match e {
        AgentError::CommandNotFound(_) => 127,
        AgentError::NotExecutable(..) => 126,
        _ => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn homes_come_from_passwd() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/srv/www:\nnone:x:5:5:::\n";
        assert_eq!(home_in(passwd, 0), Some("/root"));
        assert_eq!(home_in(passwd, 33), Some("/srv/www"));
        assert_eq!(home_in(passwd, 5), None);
        assert_eq!(home_in(passwd, 1), None);
    }

    #[test]
    fn declared_variables_keep_their_order_and_win() {
        let runtime = HashMap::from([
            ("A".to_owned(), "r".to_owned()),
            ("R".to_owned(), "r".to_owned()),
        ]);
        let env = environment(&strings(&["Z=1", "A=2", "HOME=/"]), &runtime, Some("/root"));
        assert_eq!(env, ["Z=1", "A=2", "HOME=/root", "R=r"]);
    }

    #[test]
    fn a_missing_program_and_a_closed_one_differ() {
        let env = strings(&["PATH=/nonexistent:/etc"]);
        assert_eq!(exec_in_path(&strings(&["nosuch"]), &env), Errno::ENOENT);
        // Exists, without the execute bit.
        assert_eq!(exec_in_path(&strings(&["passwd"]), &env), Errno::EACCES);
        assert_eq!(
            exec_in_path(&strings(&["/etc/passwd"]), &env),
            Errno::EACCES
        );
        assert_eq!(exec_in_path(&strings(&["/etc"]), &env), Errno::EACCES);
        assert_eq!(exec_in_path(&strings(&["a\0b"]), &env), Errno::EINVAL);
        assert_eq!(exec_in_path(&[], &env), Errno::ENOENT);
    }

    #[test]
    fn reports_become_codes() {
        let report = |e: Errno| verdict(&(e as i32).to_ne_bytes(), "x").unwrap_err();
        assert_eq!(shell_code(&report(Errno::ENOENT)), 127);
        assert_eq!(shell_code(&report(Errno::EACCES)), 126);
        assert_eq!(shell_code(&report(Errno::ENOEXEC)), 126);
        verdict(b"", "x").unwrap();
    }
}
