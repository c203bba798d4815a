//! Tests that need a process of their own.

use std::process::Command;

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
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}");
    true
}
