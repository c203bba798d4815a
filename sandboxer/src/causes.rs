//! Errors as one line for people.

use std::error::Error;

/// An error with its causes on one line. A cause that the line tells already is not
/// repeated, since some errors name their cause themselves.
#[must_use]
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use vmm_core::vm::VmError;

    use super::*;
    use crate::pod::PodError;

    #[test]
    fn each_cause_is_told_once() {
        let io = std::io::Error::other("disk on fire");
        let quiet = PodError::Vm {
            pod: "p1".to_owned(),
            source: VmError::Io {
                what: "saving".to_owned(),
                source: io,
            },
        };
        assert_eq!(with_causes(&quiet), "sandbox p1: saving: disk on fire");
        let told = PodError::Io {
            what: "writing".to_owned(),
            source: std::io::Error::other("disk on fire"),
        };
        assert_eq!(with_causes(&told), "writing: disk on fire");
    }
}
