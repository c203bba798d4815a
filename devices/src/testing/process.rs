//! Children of tests. A child that has been forked and has not yet executed its program
//! holds every fd of all tests: a tap or a file that a test closes stays open in it.

use std::io;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

/// Held from a fork until the child executes its program.
static FORK: Mutex<()> = Mutex::new(());

/// Runs `command` and keeps what it prints.
pub(crate) fn output(command: &mut Command) -> io::Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    without_forks(|| command.spawn())?.wait_with_output()
}

/// Runs `body` while no forked child holds the fds of this process.
pub(crate) fn without_forks<T>(body: impl FnOnce() -> T) -> T {
    let _alone = FORK.lock().unwrap_or_else(PoisonError::into_inner);
    body()
}

/// Runs the test `name` in a process of its own, where no other test opens fds: the test
/// calls this first and returns when the answer is `true`.
pub(crate) fn elsewhere(name: &str) -> bool {
    const ALONE: &str = "KUASAR_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--test-threads=1", "--nocapture"])
        .env(ALONE, "1");
    let output = output(&mut command).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}");
    true
}
